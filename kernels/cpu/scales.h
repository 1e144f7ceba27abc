// From the integer sums of one block of inputs to outputs.
#pragma once
#include "lanes.h"
#include "matmul_types.h"
#include "qkit_cpu.h"

namespace {

using qkit::TileArgs;
using qkit::WIDE;

constexpr int N16 = REGISTER_BYTES == 64 ? 2 : 1;  // vectors of sixteen outputs in flight

QK_INLINE F load_scale(const void* scale, int64_t i, int dtype) {
    if (dtype == QK_F32) return load((const float*)scale + i);
    const uint16_t* h = (const uint16_t*)scale + i;
    return dtype == QK_BF16 ? BF16::load16(h) : F16::load16(h);
}

// N16 * 16 outputs from `first` on: their scales in block b, and those times the zero points.
struct Scales {
    F scale[N16], scaled_zero[N16];
};
QK_INLINE void scales_here(const TileArgs& a, int64_t b, int64_t first, Scales& s) {
    const int64_t at = a.blocks[b].group * WIDE + first;
#pragma GCC unroll 2
    for (int n = 0; n < N16; ++n) {
        s.scale[n] = load_scale(a.scale, at + n * LANES, a.scale_dtype);
        s.scaled_zero[n] = a.zero ? s.scale[n] * to_float(load_u8(a.zero + at + n * LANES)) : s.scale[n];
    }
}

// The same as a call, which is nothing beside the products of several rows.
__attribute__((noinline)) void scales_of(const TileArgs& a, int64_t b, int64_t first, Scales& s) {
    scales_here(a, b, first, s);
}

QK_INLINE F joined(I upper, I lowest) { return fused(to_float(upper), splat(256.0f), to_float(lowest)); }

// What the sums of limbs stand for: the upper two as one integer.
template <int LIMBS>
QK_INLINE F value_of(const I* sum) {
    I upper = sum[LIMBS - 1];
    if (LIMBS > 1) upper = sum[LIMBS > 1 ? LIMBS - 2 : 0] + (upper << 8);
    return LIMBS > 2 ? joined(upper, sum[0]) : to_float(upper);
}

// total[16] += the sum `value` of block and row `row`.
QK_INLINE void add(const TileArgs& a, const Scales& s, int n, int64_t row, F value, float* total) {
    F t = fused(value, s.scale[n] * splat(a.x_scale[row]), load(total));
    if (a.zero) t = fused(s.scaled_zero[n], splat(-a.x_sum[row]), t);
    store(total, t);
}

}  // namespace
