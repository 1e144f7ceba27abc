// Products of bfloat16 in pairs, one pair a lane: what AVX-512 BF16 has an instruction for, and float arithmetic elsewhere.
#pragma once
#include "lanes.h"

namespace {

// Four bytes in every lane.
QK_INLINE I splat32(const void* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    return splat(word);
}

// sum + the products of two pairs in each lane.
QK_INLINE F add_pairs(F sum, I a, I b) {
#if defined(__AVX512BF16__)
    sum.v[0] = (RawF)_mm512_dpbf16_ps((__m512)sum.v[0], (__m512bh)a.v[0], (__m512bh)b.v[0]);
    return sum;
#else
    const I high = splat((int32_t)0xffff0000);
    return fused(from_bits(a & high), from_bits(b & high), fused(from_bits(a << 16), from_bits(b << 16), sum));
#endif
}

// sum[ROWS][V vectors] += rows of x times w [n][V vectors], n pairs. x: `row` values from row to row, `step` from pair to
// pair. The sums are registers where there are enough.
template <int ROWS, int V>
QK_INLINE void multiply_pairs(const uint16_t* x, int64_t row, int64_t step, const uint32_t* w, int64_t n, F (*sum)[V]) {
    for (int64_t p = 0; p < n; ++p, x += step, w += V * LANES) {
        I right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) right[v] = load(w + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const I left = splat32(x + r * row);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[r][v] = add_pairs(sum[r][v], left, right[v]);
        }
    }
}

}  // namespace
