// Many rows of bfloat16 activations times a block of outputs, with AVX-512 BF16: the codes of up to 128 inputs become
// bfloat16 once and serve all rows of the tile, twelve at a time. Integer codes are exact in bfloat16: nothing is rounded
// but the sums, which are float32, and a large input takes nothing from those beside it. x: Layout::STRIPS.
#pragma once
#include "matmul_types.h"
#include "pairs.h"
#include "scales.h"

namespace {

using qkit::Layout;
using qkit::STRIP;
using qkit::Tile;

static_assert(N16 * LANES == qkit::WIDE, "a block of outputs is two vectors");

// Sixteen values as bfloat16, looked up by the nibbles of both halves of a word at once.
struct HalfCodebook {
    __m512i all;
    explicit HalfCodebook(const float* values) {  // null: integers, less the middle
        alignas(64) uint16_t half[2 * LANES];     // twice: the index has five bits
        for (int i = 0; i < 2 * LANES; ++i) half[i] = to_bf16(values ? values[i & 15] : (float)((i & 15) - 8));
        all = _mm512_load_si512(half);
    }
    QK_INLINE I at(const HalfCodebook& t, I words, int shift) {
        I r;
        r.v[0] = (RawI)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words.v[0], (unsigned)shift), t.all);
        return r;
    }
};

// Bytes 0 and 2 of words, or 1 and 3, less the middle: exact, so the upper halves of floats.
QK_INLINE I bytes_of(I words, int odd) {
    I x;
    x.v[0] = (RawI)_mm512_xor_si512((__m512i)words.v[0], _mm512_set1_epi32((int)0x80808080));
    const F low = to_float((x << (odd ? 16 : 24)) >> 24), high = to_float((x << (odd ? 0 : 8)) >> 24);
    I r;
    r.v[0] = (RawI)_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32((__m512i)low.v[0], 16), (__m512i)high.v[0]);
    return r;
}

// A block's codes as pairs of bfloat16, [inputs / 2][32], in the order of Layout::PAIRS. table: of 4-bit codes.
template <int BITS>
void unpack(const HalfCodebook& table, const uint32_t* codes, int64_t steps, uint32_t* to) {
    for (int64_t step = 0; step < steps; ++step, to += 4 * WIDE)
        for (int n = 0; n < N16; ++n) {
            const uint32_t* from = codes + step * WIDE * BITS / 4 + n * LANES;
            const I word = load(from), next = BITS == 8 ? load(from + WIDE) : word;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const I pair = BITS == 4 ? HalfCodebook::at(table, word, 4 * j) : bytes_of(j & 1 ? next : word, j >> 1);
                std::memcpy(to + j * WIDE + n * LANES, &pair, sizeof pair);
            }
        }
}

// total[STRIP][32] += the products of a block of inputs and a strip of rows.
template <bool ZERO>
void strip(const uint16_t* x, const float* x_sum, const uint32_t* w, int64_t pairs, const F* scale, const F* offset, float* total) {
    F sum[STRIP][N16];
#pragma GCC unroll 12
    for (int m = 0; m < STRIP; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N16; ++n) sum[m][n] = splat(0.0f);
    multiply_pairs<STRIP>(x, 2, 2 * STRIP, w, pairs, sum);
#pragma GCC unroll 12
    for (int m = 0; m < STRIP; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N16; ++n) {
            float* to = total + m * WIDE + n * LANES;
            const F scaled = fused(sum[m][n], scale[n], load(to));
            store(to, ZERO ? fused(offset[n], splat(x_sum[m]), scaled) : scaled);
        }
}

template <int BITS>
void wide_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    const HalfCodebook table(a.table);
    const F middle = splat((float)(1 << (BITS - 1)));
    alignas(64) uint32_t w[qkit::BLOCK_INPUTS / 2 * WIDE];
    for (int64_t b = first; b < last; ++b) {
        const qkit::Block block = a.blocks[b];
        unpack<BITS>(table, a.codes + block.start * WIDE * BITS / 4, block.steps, w);
        Scales s;
        scales_of(a, b, 0, s);
        F offset[N16];  // what an input adds for its zero point
        for (int n = 0; n < N16; ++n) offset[n] = s.scale[n] * middle - s.scaled_zero[n];
        for (int64_t m = 0; m < a.rows; m += STRIP)
            (a.zero ? strip<true> : strip<false>)(
                (const uint16_t*)a.x + 2 * (m / STRIP * a.strip + block.start * 4 * STRIP), a.x_sum + b * a.rows + m, w,
                block.steps * 4, s.scale, offset, total + m * WIDE);
    }
}

Tile wide_tile_of(int bits, int64_t rows) {
    if (rows % STRIP) return {nullptr, Layout::STRIPS};
    return {bits == 4 ? wide_tile<4> : wide_tile<8>, Layout::STRIPS};
}

}  // namespace
