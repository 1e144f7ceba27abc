// A few activation vectors times a packed row, for decoding: the weights are read once, unpacked in registers, and
// used for all m vectors. Sixteen packed words are one vector; nibble j of its words is plane j, and the driver lays
// the activations out plane by plane, so that no lane ever moves:
//   planes[k][block][j][word] = x[k][(block * 16 + word) * per_word + j]       (zero beyond cols)
//   sums[k][block][word]      = sum over j of planes[k][block][j][word]
// With c = code - 2**(bits-1) and z likewise, a block adds  scale * (sum_j c_j x_j - z * sums)  lane by lane.
#pragma once
#include "lanes.h"
#include "quantize.h"
#include "rows.h"

namespace {

QK_INLINE F plane4(I words, int j) {
    const I shifted = words >> (4 * j);
#if defined(__AVX512F__)
    // A permutation reads four bits of each index: the sixteen values are a table, and there is nothing to mask.
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    F r;
    r.v[0] = (RawF)_mm512_permutexvar_ps((__m512i)shifted.v[0], table);
    return r;
#else
    return to_float((shifted & splat(15)) - splat(8));
#endif
}
QK_INLINE F plane8(I words, int j) { return to_float(((words >> (8 * j)) & splat(255)) - splat(128)); }

template <int BITS, int M>
void gemv_row(const qkit::GemvArgs& a, const uint32_t* packed, const void* scale, const uint8_t* zero, float* y) {
    constexpr int PER_WORD = 32 / BITS;
    const int64_t words = a.cols / PER_WORD, blocks = (words + LANES - 1) / LANES;
    const int64_t group_words = words / a.groups;  // whole: the driver refuses group sizes that do not fill words
    const bool uniform = group_words % LANES == 0 || a.groups == 1;
    F total[M];
    for (int k = 0; k < M; ++k) total[k] = splat(0.0f);

    for (int64_t b = 0; b < blocks; ++b) {
        I w;
        if ((b + 1) * LANES <= words) {
            w = load(packed + b * LANES);
        } else {
            uint32_t tail[LANES] = {};
            std::memcpy(tail, packed + b * LANES, (size_t)(words - b * LANES) * 4);
            w = load(tail);
        }
        F s, z;
        if (uniform) {
            const int64_t g = b * LANES / group_words;
            s = splat(get_scale(scale, g, a.scale_dtype));
            z = splat(zero ? (float)(zero[g] - (1 << (BITS - 1))) : 0.0f);
        } else {
            float sl[LANES] = {}, zl[LANES] = {};
            int64_t g = b * LANES / group_words, left = group_words - b * LANES % group_words;
            for (int i = 0; i < LANES && g < a.groups; ++g, left = group_words) {
                const float sg = get_scale(scale, g, a.scale_dtype);
                const float zg = zero ? (float)(zero[g] - (1 << (BITS - 1))) : 0.0f;
                for (; left > 0 && i < LANES; --left, ++i) {
                    sl[i] = sg;
                    zl[i] = zg;
                }
            }
            s = load(sl);
            z = load(zl);
        }
        F part[M];
        for (int k = 0; k < M; ++k) part[k] = splat(0.0f);
#pragma GCC unroll 8
        for (int j = 0; j < PER_WORD; ++j) {
            const F c = BITS == 4 ? plane4(w, j) : plane8(w, j);
            for (int k = 0; k < M; ++k)
                part[k] = fused(c, load(a.planes + ((k * blocks + b) * PER_WORD + j) * LANES), part[k]);
        }
        for (int k = 0; k < M; ++k) {
            if (zero) part[k] = part[k] - z * load(a.sums + (k * blocks + b) * LANES);
            total[k] = fused(part[k], s, total[k]);
        }
    }
    for (int k = 0; k < M; ++k) {
        float lanes[LANES];
        store(lanes, total[k]);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        y[k] = lanes[0];
    }
}

// m is 1, 2, 4 or 8: the driver pads.
template <int BITS>
void gemv_rows(const qkit::GemvArgs& a, const uint32_t* packed, const void* scale, const uint8_t* zero, float* y) {
    switch (a.m) {
        case 1: return gemv_row<BITS, 1>(a, packed, scale, zero, y);
        case 2: return gemv_row<BITS, 2>(a, packed, scale, zero, y);
        case 4: return gemv_row<BITS, 4>(a, packed, scale, zero, y);
        default: return gemv_row<BITS, 8>(a, packed, scale, zero, y);
    }
}

void gemv(const qkit::GemvArgs& a, const uint32_t* packed, const void* scale, const uint8_t* zero, float* y) {
    return a.bits == 4 ? gemv_rows<4>(a, packed, scale, zero, y) : gemv_rows<8>(a, packed, scale, zero, y);
}

}  // namespace
