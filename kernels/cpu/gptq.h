// The inner loops of GPTQ (kernels/gptq.py): the weighted scale search, and the two that visit one column after
// another, the last one first. The latter work on [columns, out] matrices: sixteen output channels are sixteen lanes, every channel is
// independent of the others, and a slice of them stays in the first-level cache for all columns of a block.
// Products and sums are rounded one by one, in the order of reference.py: bit-equal to it on every ISA.
#pragma once
#include "lanes.h"
#include "quantize.h"
#include "rows.h"

namespace {

// ---- scale search ------------------------------------------------------------------------------------------------

// sum of cost * (w - nearest grid value)^2 over a group, in units of the scale squared.
template <class W>
QK_INLINE double weighted_loss(const typename W::T* x, const float* cost, int64_t size, float s, int z, int max_code) {
    const F vs = splat(s), least = splat((float)-z), most = splat((float)(max_code - z)), magic = splat(MAGIC);
    F total = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        const F t = load_padded<W>(x, i, size) / vs;
        const F e = t - ((min(max(t, least), most) + magic) - magic);
        total = total + e * e * load_padded<F32>(cost, i, size);
    }
    float lanes[LANES];
    store(lanes, total);
    double sum = 0.0;
    for (int k = 0; k < LANES; ++k) sum += (double)lanes[k];
    return sum * (double)s * (double)s;
}

template <class W>
int search_row(const qkit::QuantizeArgs& a, const typename W::T* w, const float* cost, void* scale, uint8_t* zero) {
    const int64_t size = a.cols / a.groups;
    const int max_code = (1 << a.bits) - 1, mid = 1 << (a.bits - 1);
    for (int64_t g = 0; g < a.groups; ++g) {
        const typename W::T* x = w + g * size;
        float lo = 0.0f, hi = 0.0f;
        for (int64_t i = 0; i < size; ++i) {
            const float v = W::get(x + i);
            if (!finite(v)) return QK_NON_FINITE;
            lo = v < lo ? v : lo;
            hi = v > hi ? v : hi;
        }
        const float exact = a.symmetric ? (hi > -lo ? hi : lo) / (float)-mid : (hi - lo) / (float)max_code;
        double best = 0.0;
        float chosen = 0.0f;
        int chosen_zero = mid;
        for (int c = 0; c < a.candidates; ++c) {
            const float s = round_scale(exact * a.multipliers[c], a.scale_dtype);
            if (!finite(s) || magnitude(s) < least_scale(a.scale_dtype)) continue;
            const int z = a.symmetric ? mid : zero_point(lo * a.multipliers[c], s, max_code, a.min_zero);
            const double loss = weighted_loss<W>(x, cost + g * size, size, s, z, max_code);
            if (chosen != 0.0f && !(loss < best)) continue;
            best = loss;
            chosen = s;
            chosen_zero = z;
        }
        if (chosen == 0.0f) {  // all zero, or too small for the stored type: zero on any grid
            if (magnitude(exact) >= 1.0f) return QK_SCALE_OVERFLOW;
            chosen = 1.0f;
        }
        put_scale(scale, g, a.scale_dtype, chosen);
        if (!a.symmetric) zero[g] = (uint8_t)chosen_zero;
    }
    return QK_OK;
}

int search(const qkit::QuantizeArgs& a, const void* w, const float* cost, void* scale, uint8_t* zero) {
    switch (a.w_dtype) {
        case QK_F32: return search_row<F32>(a, (const float*)w, cost, scale, zero);
        case QK_F16: return search_row<F16>(a, (const uint16_t*)w, cost, scale, zero);
        default: return search_row<BF16>(a, (const uint16_t*)w, cost, scale, zero);
    }
}

// ---- column by column ----------------------------------------------------------------------------------------------

QK_INLINE F load_n(const float* x, int64_t n) {
    if (n == LANES) return load(x);
    float lanes[LANES] = {};
    std::memcpy(lanes, x, (size_t)n * sizeof(float));
    return load(lanes);
}
QK_INLINE void store_n(float* to, F x, int64_t n) {
    float lanes[LANES];
    store(lanes, x);
    std::memcpy(to, lanes, (size_t)n * sizeof(float));
}

// The scales of n channels; unused lanes get 1, since they are divided by.
QK_INLINE F load_scales(const float* x, int64_t n) {
    if (n == LANES) return load(x);
    float lanes[LANES];
    for (int64_t k = 0; k < LANES; ++k) lanes[k] = k < n ? x[k] : 1.0f;
    return load(lanes);
}

// x is within +-2**22 after clamping to the codes' range.
QK_INLINE F nearest(F x) { return (x + splat(MAGIC)) - splat(MAGIC); }

// Channels begin .. begin + n - 1 of one block of columns; n <= 16.
void feedback(const qkit::ColumnArgs& a, int64_t begin, int64_t n) {
    float target[qkit::MAX_COLUMNS][LANES];
    for (int64_t j = 0; j < a.columns; ++j) store(target[j], load_n(a.target + j * a.out + begin, n));
    for (int64_t j = a.columns - 1; j >= 0; --j) {
        const int64_t at = j * a.out + begin;
        const F s = load_scales(a.scale + at, n);
        const F z = a.zero ? load_n(a.zero + at, n) : splat(a.mid);
        const F level = nearest(min(max(load(target[j]) / s, splat(0.0f) - z), splat(a.top) - z));
        const F error = load_n(a.weight + at, n) - level * s;
        store_n(a.codes + at, level + z, n);
        store_n(a.errors + at, error, n);
        const float* l = a.matrix + j * a.stride;
        for (int64_t i = 0; i < j; ++i) store(target[i], load(target[i]) + splat(l[i]) * error);
    }
}

void descend(const qkit::ColumnArgs& a, int64_t begin, int64_t n) {
    float gradient[qkit::MAX_COLUMNS][LANES];
    for (int64_t j = 0; j < a.columns; ++j) store(gradient[j], load_n(a.target + j * a.out + begin, n));
    for (int64_t j = a.columns - 1; j >= 0; --j) {
        const int64_t at = j * a.out + begin;
        const F s = load_scales(a.scale + at, n);
        const F code = load_n(a.codes + at, n), limit = splat(1e6f);
        const F wanted = load(gradient[j]) / (s * splat(a.diagonal[j]));
        const F moved = nearest(min(max(min(max(wanted, splat(-1e6f)), limit) + code, splat(0.0f)), splat(a.top)));
        const F step = (moved - code) * s;
        store_n(a.codes + at, moved, n);
        store_n(a.errors + at, step, n);
        const float* h = a.matrix + j * a.stride;  // symmetric: the row is the column
        for (int64_t i = 0; i < j; ++i) store(gradient[i], load(gradient[i]) - splat(h[i]) * step);
    }
}

}  // namespace
