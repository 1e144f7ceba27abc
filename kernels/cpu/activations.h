// The ends of the matmul (matmul.h): a row of activations as its tile reads it, and a row of sums as an output.
//
// Fixed point: a block of at most 128 inputs gets a scale and one, two or three signed bytes ("limbs") an input.
// Two limbs (error 2**-16 of the block's largest input) carry bfloat16 and float16, three (2**-24) float32, and 16-bit inputs
// of which some block is uneven: its largest would take bits from the others that these have. One is int8 activations, whose
// scale is that of the whole row.
#pragma once
#include <cmath>

#include "lanes.h"
#include "matmul_types.h"
#include "qkit_cpu.h"
#include "rows.h"

namespace {

using qkit::Layout;
using qkit::PrepareArgs;

using qkit::BLOCK_INPUTS;

QK_INLINE F magnitude(F x) { return from_bits(bits_of(x) & splat(0x7fffffff)); }

// The largest magnitude of x[0 .. n), n a multiple of sixteen; infinity where one is NaN or infinite.
float largest(const float* x, int64_t n) {
    I most = splat(0);  // magnitudes are ordered as their bits are, NaN behind infinity
    for (int64_t i = 0; i < n; i += LANES) most = max(bits_of(magnitude(load(x + i))), most);
    const int32_t bits = largest(most);
    return bits > 0x7f7fffff ? INFINITY : as_float((uint32_t)bits);
}

// Inputs begin .. begin + size as float, zero beyond n and up to a multiple of sixteen.
template <class W>
void widen(const void* x, int64_t begin, int64_t size, int64_t n, float* to) {
    const typename W::T* from = (const typename W::T*)x;
    for (int64_t i = begin; i < begin + size; i += LANES) {
        const int64_t end = begin + size < n ? begin + size : n;
        store(to + (i - begin), i >= end ? splat(0.0f) : load_padded<W>(from, i, end));
    }
}

void inputs(const void* x, int dtype, int64_t begin, int64_t size, int64_t n, float* to) {
    switch (dtype) {
        case QK_F32: return widen<F32>(x, begin, size, n, to);
        case QK_F16: return widen<F16>(x, begin, size, n, to);
        default: return widen<BF16>(x, begin, size, n, to);
    }
}

// Eight 16-bit values as four pairs, in the order of Layout::PAIRS; from one pair to the next `step` words.
QK_INLINE void store_pairs(uint32_t* to, int step, const uint16_t* eight) {
    uint64_t four[2];
    std::memcpy(four, eight, sizeof four);
    for (int k = 0; k < 2; ++k) {
        const uint64_t v = four[k];
        to[k * step] = (uint32_t)(v & 0xffff) | (uint32_t)(v >> 16 & 0xffff0000u);
        to[(2 + k) * step] = (uint32_t)(v >> 16 & 0xffff) | (uint32_t)(v >> 32 & 0xffff0000u);
    }
}

// Where block b of row m lies as bytes or 16-bit integers: put stores the k-th of sixteen inputs from i on.
template <int LIMBS>
struct AsBytes {
    static constexpr int WORDS = LIMBS;  // integers an input
    int8_t* to;  // where the first limb's first bytes go, and how far apart limbs and quads of inputs are
    int64_t limb_step, quad_step;

    AsBytes(const PrepareArgs& a, int64_t b, int64_t m) {
        const int64_t width = a.rows * LIMBS;
        const bool rows = a.layout == Layout::ROWS;
        to = (int8_t*)a.x + (rows ? ((b * a.rows + m / 16 * 16) * LIMBS + m % 16) * a.row_bytes
                                  : a.blocks[b].start * 8 * width + 4 * m * LIMBS);
        limb_step = rows ? 16 * a.row_bytes : 4;
        quad_step = rows ? 4 : 4 * width;
    }
    void pad(int64_t size, int64_t row_bytes) const {
        for (int l = 0; l < LIMBS; ++l) std::memset(to + l * limb_step + size, 0, (size_t)(row_bytes - size));
    }
    QK_INLINE void put(const AsBytes& t, I limb, int k, int64_t i, int64_t quads) {
        uint8_t bytes[LANES];
        store_u8(bytes, limb);
        for (int64_t q = 0; q < quads; ++q)
            std::memcpy(t.to + (i / 4 + q) * t.quad_step + k * t.limb_step, bytes + 4 * q, 4);
    }
};
template <int LIMBS>
struct AsShorts {
    static constexpr int WORDS = LIMBS > 2 ? 2 : 1;
    uint32_t* to;
    int64_t word_step;
    int strip;  // rows

    AsShorts(const PrepareArgs& a, int64_t b, int64_t m) {
        strip = (int)qkit::short_strip(a.rows);
        to = (uint32_t*)a.x + m / strip * WORDS * a.strip + a.blocks[b].start * 4 * strip + m % strip;
        word_step = a.strip;
    }
    void pad(int64_t, int64_t) const {}
    QK_INLINE void put(const AsShorts& t, I word, int k, int64_t i, int64_t quads) {
        uint16_t halves[LANES];
        store_u16(halves, word);
        for (int64_t e = 0; e < quads / 2; ++e)
            store_pairs(t.to + k * t.word_step + (i + 8 * e) / 2 * t.strip, t.strip, halves + 8 * e);
    }
};

// Block b of row m as fixed point, x float [up to 128, zero padded], `most` its largest magnitude (or the row's). DEEP: limbs
// that its values fill; below LIMBS the lowest stay zero, and what comes of it is bit for bit that of as many limbs.
template <int LIMBS, int DEEP, class Put>
void fix_as(const PrepareArgs& a, int64_t b, int64_t m, const float* x, float most) {
    constexpr float STEPS = DEEP == 1 ? 127.0f : DEEP == 2 ? 32512.0f : 8323072.0f;  // 127 * 256**(DEEP - 1)
    constexpr int WORDS = Put::WORDS;
    const int64_t size = a.blocks[b].steps * 8;
    const bool finite = most < INFINITY;
    float scale = finite ? most / STEPS : 1.0f;
    if (scale < 1e-30f) scale = LIMBS == 1 && scale > 0.0f ? scale : 1.0f;  // nothing: never divide by a subnormal
    const F s = splat(scale), magic = splat(MAGIC);
    const I magic_bits = splat((int)as_bits(MAGIC));
    const Put put(a, b, m);
    I sum[WORDS];
    for (int l = 0; l < WORDS; ++l) sum[l] = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t quads = size - i < LANES ? (size - i) / 4 : 4;
        F t = load(x + i) / s;
        if (!finite) t = splat(0.0f);
        I fixed;
        if (DEEP == 3) {  // beyond the magic number's 22 bits: first the upper part
            const F upper = (t * splat(0x1p-8f) + magic) - magic;
            fixed = ((bits_of(upper + magic) - magic_bits) << 8) + (bits_of((t - upper * splat(256.0f)) + magic) - magic_bits);
        } else {
            fixed = (bits_of(t + magic) - magic_bits) << 8 * (LIMBS - DEEP);
        }
#pragma GCC unroll 3
        for (int k = 0; k < WORDS; ++k) {
            const I word = k == WORDS - 1 ? fixed : (fixed << 24) >> 24;
            fixed = (fixed - word) >> 8;
            sum[k] = sum[k] + word;
            Put::put(put, word, k, i, quads);
        }
    }
    if (a.layout == Layout::ROWS) put.pad(size, a.row_bytes);

    double value = 0.0, unit = 1.0;
    for (int l = 0; l < WORDS; ++l, unit *= 256.0) {
        const int32_t word_sum = total(sum[l]);
        a.start[(b * a.rows + m) * WORDS + l] = a.symmetric ? -a.middle * word_sum : 0;
        value += unit * word_sum;
    }
    if (DEEP < LIMBS) scale *= 0x1p-8f;
    const float bad = finite ? 0.0f : NAN;
    a.x_scale[b * a.rows + m] = scale + bad;
    a.x_sum[b * a.rows + m] = (float)(value * scale) + bad;
}

template <int LIMBS, int DEEP = LIMBS>
void fix(const PrepareArgs& a, int64_t b, int64_t m, const float* x, float most) {
    if (a.layout == Layout::SHORTS) fix_as<LIMBS, DEEP, AsShorts<LIMBS>>(a, b, m, x, most);
    else fix_as<LIMBS, DEEP, AsBytes<LIMBS>>(a, b, m, x, most);
}

// For a codebook, as it is, at the place where its codes will be. PAIRS: pair j of eight inputs is what nibbles j of a
// word's two halves meet, inputs 0 2, 4 6, 1 3, 5 7.
void spread(const PrepareArgs& a, int64_t begin, int64_t size, int64_t m, const float* x) {
    for (int64_t i = 0; i < size; ++i) {
        if (a.layout == Layout::FLOATS) {
            ((float*)a.x)[(begin + i) * a.rows + m] = x[i];
            continue;
        }
        const int64_t k = i % 8, pair = (k & 1) * 2 + (k >> 2), side = (k >> 1) & 1;
        ((uint16_t*)a.x)[(((begin + i) / 8 * 4 + pair) * a.rows + m) * 2 + side] = to_bf16(x[i]);
    }
}

// Block b for Layout::STRIPS, whose activations are bfloat16: eight inputs are two words of four.
void spread_strips(const PrepareArgs& a, int64_t b, int64_t m, const uint16_t* x) {
    const int64_t begin = a.blocks[b].start * 8, size = a.blocks[b].steps * 8;
    uint32_t* to = (uint32_t*)a.x + m / qkit::STRIP * a.strip + begin / 2 * qkit::STRIP + m % qkit::STRIP;
    for (int64_t i = begin; i < begin + size; i += 8, to += 4 * qkit::STRIP) {
        uint16_t eight[8] = {};
        std::memcpy(eight, x + i, (size_t)(a.cols - i < 8 ? a.cols - i : 8) * 2);
        store_pairs(to, qkit::STRIP, eight);
    }
    if (a.symmetric) return;
    float block[BLOCK_INPUTS];
    widen<BF16>(x, begin, size, a.cols, block);
    F sum = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) sum = sum + load(block + i);
    a.x_sum[b * a.rows + m] = total(sum);
}

// Whether a block's largest input is so far above the mean of the others that two limbs lose more of these than rounding
// the outputs does: an output of nothing but the others is off by about ratio * 2**-17 of itself.
bool uneven(const qkit::Block* blocks, int64_t n_blocks, const void* x, int x_dtype, int64_t cols) {
    const float ratio = x_dtype == QK_F16 ? 64.0f : 256.0f;
    float block[BLOCK_INPUTS];
    for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t size = blocks[b].steps * 8;
        inputs(x, x_dtype, blocks[b].start * 8, size, cols, block);
        F all = splat(0.0f);
        for (int64_t i = 0; i < size; i += LANES) all = all + magnitude(load(block + i));
        const float most = largest(block, size), others = total(all) - most;  // zero: nothing there to lose
        if (others > 0.0f && most * (float)(size - 1) > ratio * others && most < INFINITY) return true;
    }
    return false;
}

void prepare(const PrepareArgs& a, const void* x, int x_dtype, int64_t m) {
    float block[BLOCK_INPUTS];
    float whole = 0.0f;  // int8: one scale for the row
    if (a.limbs == 1)
        for (int64_t i = 0; i < a.cols; i += BLOCK_INPUTS) {
            const int64_t size = a.cols - i < BLOCK_INPUTS ? a.cols - i : BLOCK_INPUTS;
            inputs(x, x_dtype, i, size, a.cols, block);
            const float most = largest(block, size);
            whole = most > whole ? most : whole;
        }
    // Where another row is uneven this one has three limbs too, and is what it is without that row.
    const bool even = a.limbs == 3 && x_dtype != QK_F32 && !uneven(a.blocks, a.n_blocks, x, x_dtype, a.cols);
    for (int64_t b = 0; b < a.n_blocks; ++b) {
        const int64_t begin = a.blocks[b].start * 8, size = a.blocks[b].steps * 8;
        if (a.layout == Layout::STRIPS) {
            spread_strips(a, b, m, (const uint16_t*)x);
            continue;
        }
        inputs(x, x_dtype, begin, size, a.cols, block);
        switch (a.limbs) {
            case 0: spread(a, begin, size, m, block); break;
            case 1: fix<1>(a, b, m, block, whole); break;
            case 2: fix<2>(a, b, m, block, largest(block, size)); break;
            default:
                if (even) fix<3, 2>(a, b, m, block, largest(block, size));
                else fix<3>(a, b, m, block, largest(block, size));
        }
    }
}

template <class W>
QK_INLINE void finish_row(const float* total, const void* bias, void* y, int64_t n) {
    const typename W::T* add = (const typename W::T*)bias;
    typename W::T* to = (typename W::T*)y;
    for (int64_t i = 0; i < n; i += LANES) {
        F sum = load(total + i);
        if (bias) sum = sum + load_padded<W>(add, i, n);
        if (i + LANES <= n) {
            W::store16(to + i, sum);
            continue;
        }
        typename W::T tail[LANES];
        W::store16(tail, sum);
        std::memcpy(to + i, tail, (size_t)(n - i) * sizeof(tail[0]));
    }
}

void finish(const float* total, const void* bias, void* y, int dtype, int64_t n) {
    switch (dtype) {
        case QK_F32: return finish_row<F32>(total, bias, y, n);
        case QK_F16: return finish_row<F16>(total, bias, y, n);
        default: return finish_row<BF16>(total, bias, y, n);
    }
}

}  // namespace
