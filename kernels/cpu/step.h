// The kernels of step_types.h, over sixteen lanes.
#pragma once
#include <cmath>

#include "lanes.h"
#include "pairs.h"
#include "qkit_decoder.h"
#include "step_types.h"

namespace {

// To bfloat16 and back.
QK_INLINE F rounded(F x) { return from_bits(BF16::bits(x) << 16); }

// The first n of sixteen lanes of what follows; n may be more.
template <class W>
QK_INLINE void store_part(typename W::T* to, F x, int64_t n) {
    if (n >= LANES) return W::store16(to, x);
    typename W::T tail[LANES];
    W::store16(tail, x);
    std::memcpy(to, tail, (size_t)n * sizeof(tail[0]));
}

// e**x within 2 units in the last place; that of -87 below; NaN stays.
QK_INLINE F exponential(F x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));  // in this order: of NaN and another the second
    const F magic = splat(MAGIC), n = fused(x, splat(1.44269504f), magic), whole = n - magic;
    const F r = fused(whole, splat(-1.42860677e-6f), fused(whole, splat(-0.693145752f), x));
    F p = splat(1.9875691e-4f);
    p = fused(p, r, splat(1.3981999e-3f));
    p = fused(p, r, splat(8.3334519e-3f));
    p = fused(p, r, splat(4.1665795e-2f));
    p = fused(p, r, splat(1.6666665e-1f));
    p = fused(p, r, splat(5.0000001e-1f));
    p = fused(p * r, r, r + splat(1.0f));
    return p * from_bits((bits_of(n) - splat((int32_t)as_bits(MAGIC) - 127)) << 23);
}

void step_widen(const uint16_t* x, float* to, int64_t n, float scale) {
    for (int64_t i = 0; i < n; i += LANES) store_part<F32>(to + i, load_padded<BF16>(x, i, n) * splat(scale), n - i);
}

void step_narrow(const float* x, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store_part<BF16>(to + i, load_padded<F32>(x, i, n), n - i);
}

void step_add(float* x, const uint16_t* y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES)
        store_part<F32>(x + i, load_padded<F32>(x, i, n) + load_padded<BF16>(y, i, n), n - i);
}

void step_norm(const float* x, const uint16_t* weight, float offset, float* to, int64_t n, float epsilon) {
    F squares = splat(0.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        const F v = load_padded<F32>(x, i, n);
        squares = fused(v, v, squares);
    }
    const F scale = splat(1.0f / std::sqrt(total(squares) / (float)n + epsilon)), more = splat(offset);
    for (int64_t i = 0; i < n; i += LANES) {
        const F w = load_padded<BF16>(weight, i, n) + more;
        store_part<F32>(to + i, load_padded<F32>(x, i, n) * scale * w, n - i);
    }
}

void step_rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const F a = load_padded<F32>(x, i, half), b = load_padded<F32>(x + half, i, half);
        const F c = load_padded<F32>(cosine, i, half), s = load_padded<F32>(sine, i, half);
        store_part<F32>(x + i, a * c - b * s, half - i);
        store_part<F32>(x + half + i, fused(b, c, a * s), half - i);
    }
}

// The model rounds what the activation gives before it multiplies.
void step_gated(const uint16_t* gate, const uint16_t* up, uint16_t* to, int64_t n, int activation) {
    for (int64_t i = 0; i < n; i += LANES) {
        const F g = load_padded<BF16>(gate, i, n), one = splat(1.0f);
        F t = g;
        if (activation == QK_GELU_TANH) t = splat(1.5957691216f) * fused(splat(0.044715f) * g * g, g, g);
        const F y = rounded(g / (one + exponential(splat(0.0f) - t)));
        store_part<BF16>(to + i, y * load_padded<BF16>(up, i, n), n - i);
    }
}

// Thirty-two bfloat16s as pairs, zeros beyond the first n.
QK_INLINE I pairs(const uint16_t* x, int64_t n) {
    if (n >= 2 * LANES) return load((const uint32_t*)x);
#if defined(__AVX512F__)
    I r;
    r.v[0] = (RawI)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), x);
    return r;
#else
    uint32_t tail[LANES] = {};
    std::memcpy(tail, x, (size_t)n * sizeof(*x));
    return load(tail);
#endif
}

// One row of the weight times M vectors. One at a time: of several streams the processor fetches ahead at half the rate.
template <int M>
QK_INLINE void dense_row(const uint16_t* w, const uint16_t* end, const uint16_t* x, int64_t cols, float* y) {
    constexpr int SETS = M == 1 ? 2 : 1;  // few accumulators would wait for one another
    F sum[SETS][M];
    for (int s = 0; s < SETS; ++s)
        for (int m = 0; m < M; ++m) sum[s][m] = splat(0.0f);
#if defined(__AVX512BF16__)
    constexpr int64_t STEP = 2 * LANES;
    const auto more = [&](int s, int64_t i, int64_t n) __attribute__((always_inline)) {
        const I part = pairs(w + i, n);
        fetch_ahead(w + i, end);
        for (int m = 0; m < M; ++m) sum[s][m] = add_pairs(sum[s][m], part, pairs(x + m * cols + i, n));
    };
#else
    constexpr int64_t STEP = LANES;
    const auto more = [&](int s, int64_t i, int64_t n) __attribute__((always_inline)) {
        const bool whole = n >= LANES;
        if (i % (2 * LANES) == 0) fetch_ahead(w + i, end);
        const F part = whole ? BF16::load16(w + i) : load_padded<BF16>(w, i, cols);
        for (int m = 0; m < M; ++m) {
            const uint16_t* v = x + m * cols;
            sum[s][m] = fused(part, whole ? BF16::load16(v + i) : load_padded<BF16>(v, i, cols), sum[s][m]);
        }
    };
#endif
    int64_t i = 0;
    for (; i + SETS * STEP <= cols; i += SETS * STEP)
        for (int s = 0; s < SETS; ++s) more(s, i + s * STEP, STEP);
    for (; i < cols; i += STEP) more(0, i, cols - i);
    for (int m = 0; m < M; ++m) y[m] = total(SETS == 2 ? sum[0][m] + sum[SETS - 1][m] : sum[0][m]);
}

template <int M>
void dense_rows(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t begin, int64_t end,
                int64_t rows, int64_t cols) {
    for (int64_t r = begin; r < end; ++r) {
        float y[M];
        dense_row<M>(w + r * cols, w + end * cols, x, cols, y);
        for (int m = 0; m < M; ++m) out[m * rows + r] = to_bf16(y[m] + (bias ? BF16::get(bias + r) : 0.0f));
    }
}

void step_dense(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m, int64_t begin,
                int64_t end, int64_t rows, int64_t cols) {
    int64_t b = 0;
    for (; b + 4 <= m; b += 4) dense_rows<4>(w, x + b * cols, bias, out + b * rows, begin, end, rows, cols);
    for (; b < m; ++b) dense_rows<1>(w, x + b * cols, bias, out + b * rows, begin, end, rows, cols);
}

}  // namespace
