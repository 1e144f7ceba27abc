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

// total[16] += what the limbs' sums of block b and row m stand for.
template <int LIMBS>
QK_INLINE void add(const TileArgs& a, const Scales& s, int n, int64_t row, const I* sum, float* total) {
    I fixed = sum[0];
    if (LIMBS > 1) fixed = fixed + (sum[LIMBS > 1] << 8);
    F value = to_float(fixed);
    if (LIMBS > 2) value = fused(to_float(sum[LIMBS - 1]), splat(65536.0f), value);
    F t = fused(value, s.scale[n] * splat(a.x_scale[row]), load(total));
    if (a.zero) t = fused(s.scaled_zero[n], splat(-a.x_sum[row]), t);
    store(total, t);
}

}  // namespace
