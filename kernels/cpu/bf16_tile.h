// Many rows of bfloat16 activations times a block of outputs, with AVX-512 BF16: the codes of up to 128 inputs become
// bfloat16 once and serve all rows of the tile, twelve at a time. Integer codes are exact in bfloat16: nothing is rounded
// but the sums, which are float32, and a large input takes nothing from those beside it. x: Layout::STRIPS.
#pragma once
#include "lanes.h"
#include "matmul_types.h"
#include "scales.h"

namespace {

using qkit::Layout;
using qkit::STRIP;
using qkit::Tile;

static_assert(N16 * LANES == qkit::WIDE, "a block of outputs is two vectors");

// A block's codes as pairs of bfloat16, [inputs / 2][32], in the order of Layout::PAIRS.
template <int BITS>
struct Pairs {
    __m512i table;
    explicit Pairs(const float* values) {  // null: integers, less the middle
        alignas(64) uint16_t half[32];     // twice: the index has five bits
        for (int i = 0; i < 32; ++i) half[i] = to_bf16(values ? values[i & 15] : (float)((i & 15) - 8));
        table = _mm512_load_si512(half);
    }
    QK_INLINE __m512i nibbles(const Pairs& p, __m512i word, int j) {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), p.table);
    }
    // Bytes 0 and 2 of a word, or 1 and 3.
    QK_INLINE __m512i bytes(__m512i word, int odd) {
        const __m512i middle = _mm512_set1_epi32((int)0x80808080), x = _mm512_xor_si512(word, middle);
        const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, odd ? 16 : 24), 24);
        const __m512i high = _mm512_srai_epi32(_mm512_slli_epi32(x, odd ? 0 : 8), 24);
        const __m512i a = (__m512i)_mm512_cvtepi32_ps(low), b = (__m512i)_mm512_cvtepi32_ps(high);
        return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
    }
    void unpack(const uint32_t* codes, int64_t steps, uint32_t* to) const {
        for (int64_t step = 0; step < steps; ++step, to += 4 * WIDE)
            for (int n = 0; n < N16; ++n) {
                const uint32_t* from = codes + step * WIDE * BITS / 4 + n * LANES;
                const __m512i word = _mm512_loadu_si512(from), next = BITS == 8 ? _mm512_loadu_si512(from + WIDE) : word;
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    _mm512_store_si512(to + j * WIDE + n * LANES,
                                       BITS == 4 ? nibbles(*this, word, j) : bytes(j & 1 ? next : word, j >> 1));
            }
    }
};

// total[STRIP][32] += the products of a block of inputs and a strip of rows. A row's sums over the block are registers.
template <bool ZERO>
void strip(const uint32_t* x, const float* x_sum, const uint32_t* w, int64_t pairs, const F* scale, const F* offset, float* total) {
    __m512 acc[STRIP][N16];
#pragma GCC unroll 12
    for (int m = 0; m < STRIP; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N16; ++n) acc[m][n] = _mm512_setzero_ps();
    for (const uint32_t* end = w + pairs * WIDE; w < end; x += STRIP, w += WIDE) {
        const __m512bh low = (__m512bh)_mm512_load_si512(w), high = (__m512bh)_mm512_load_si512(w + LANES);
#pragma GCC unroll 12
        for (int m = 0; m < STRIP; ++m) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[m]);
            acc[m][0] = _mm512_dpbf16_ps(acc[m][0], low, pair);
            acc[m][1] = _mm512_dpbf16_ps(acc[m][1], high, pair);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < STRIP; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N16; ++n) {
            float* to = total + m * WIDE + n * LANES;
            F product;
            product.v[0] = (RawF)acc[m][n];
            product = fused(product, scale[n], load(to));
            store(to, ZERO ? fused(offset[n], splat(x_sum[m]), product) : product);
        }
}

template <int BITS>
void wide_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    const Pairs<BITS> codes(a.table);
    const F middle = splat((float)(1 << (BITS - 1)));
    alignas(64) uint32_t w[qkit::BLOCK_INPUTS / 2 * WIDE];
    for (int64_t b = first; b < last; ++b) {
        const qkit::Block block = a.blocks[b];
        codes.unpack(a.codes + block.start * WIDE * BITS / 4, block.steps, w);
        Scales s;
        scales_of(a, b, 0, s);
        F offset[N16];  // what an input adds for its zero point
        for (int n = 0; n < N16; ++n) offset[n] = s.scale[n] * middle - s.scaled_zero[n];
        for (int64_t m = 0; m < a.rows; m += STRIP)
            (a.zero ? strip<true> : strip<false>)(
                (const uint32_t*)a.x + m / STRIP * a.strip + block.start * 4 * STRIP, a.x_sum + b * a.rows + m, w,
                block.steps * 4, s.scale, offset, total + m * WIDE);
    }
}

Tile wide_tile_of(int bits, int64_t rows) {
    if (rows % STRIP) return {nullptr, Layout::STRIPS};
    return {bits == 4 ? wide_tile<4> : wide_tile<8>, Layout::STRIPS};
}

}  // namespace
