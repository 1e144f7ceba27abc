// Activations times a prepacked weight. The weight's layout (qk_prepack) serves every number of activations and every
// ISA: blocks of 32 outputs; in each, for every eight inputs, 32 words of 4-bit codes (or twice 32 words of 8-bit
// codes), one word an output: lanes are outputs, no sum ever crosses a lane, and one thread reads one stream.
//   4 bits: byte b of a word holds input b in its low and input 4 + b in its high nibble
//   8 bits: byte b of the first 32 words holds input b, of the second 32 words input 4 + b
//
// Integer weights: activations are fixed point, per row and block of at most 128 inputs (never more than a group):
// a scale and one, two or three signed bytes ("limbs") an input (activations.h). A limb times four codes is one dot4 (or
// limbs are 16-bit integers: short_tile.h), the sums are exact integers (at most 255 * 128 * 128, and 257 times that for
// two limbs: below 2**31), and scales are applied once a block. A tile is MB rows of activations; MB * LIMBS "virtual
// rows" share one pass over the codes.
//
// Codebooks (16 floats): values are looked up lane by lane and multiplied in float, with AVX-512 BF16 in pairs of bfloat16.
#pragma once
#include "lanes.h"
#include "matmul_types.h"
#include "pairs.h"
#include "scales.h"
#if defined(__AVX512BF16__)
#include "bf16_tile.h"
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "short_tile.h"
#endif

namespace {

using qkit::Block;
using qkit::Layout;
using qkit::Tile;

template <int BITS, int LIMBS, int MB>
void tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    constexpr int V = MB * LIMBS;
    // Few accumulators would wait for one another: the low and the high inputs then have their own.
    constexpr int SETS = V * N16 * PARTS <= 4 ? 2 : 1;
    constexpr int STEP = BITS == 4 ? WIDE : 2 * WIDE;
    const I nibble = splat(0x0f0f0f0f);

    for (int64_t b = first; b < last; ++b)
        for (int half = 0; half < 2 / N16; ++half) {
            const Block block = a.blocks[b];
            const uint32_t* w = a.codes + block.start * STEP + half * LANES;
            const int8_t* x = (const int8_t*)a.x + block.start * 8 * V;
            I acc[SETS][V][N16];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                const I start = splat(a.start[b * V + v]);
#pragma GCC unroll 2
                for (int n = 0; n < N16; ++n) {
                    acc[0][v][n] = start;
                    if (SETS == 2) acc[SETS - 1][v][n] = splat(0);
                }
            }
#pragma GCC unroll 2
            for (int64_t step = 0; step < block.steps; ++step, w += STEP, x += 8 * V) {
                I low[N16], high[N16];
#pragma GCC unroll 2
                for (int n = 0; n < N16; ++n) {
                    fetch_ahead(w + n * LANES, a.end);
                    if (BITS == 8) fetch_ahead(w + WIDE + n * LANES, a.end);
                    const I word = load(w + n * LANES);
                    low[n] = BITS == 4 ? word & nibble : word;
                    high[n] = BITS == 4 ? (word >> 4) & nibble : load(w + WIDE + n * LANES);
                }
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) {
                    const I xl = splat32(x + 4 * v), xh = splat32(x + 4 * (V + v));
#pragma GCC unroll 2
                    for (int n = 0; n < N16; ++n) {
                        acc[0][v][n] = dot4<BITS>(acc[0][v][n], low[n], xl);
                        acc[SETS - 1][v][n] = dot4<BITS>(acc[SETS - 1][v][n], high[n], xh);
                    }
                }
            }
            Scales scales;
            if (MB == 1) scales_here(a, b, half * LANES, scales);
            else scales_of(a, b, half * LANES, scales);
#pragma GCC unroll 12
            for (int m = 0; m < MB; ++m)
#pragma GCC unroll 2
                for (int n = 0; n < N16; ++n) {
                    I sum[LIMBS];
#pragma GCC unroll 3
                    for (int l = 0; l < LIMBS; ++l) {
                        sum[l] = acc[0][m * LIMBS + l][n];
                        if (SETS == 2) sum[l] = sum[l] + acc[SETS - 1][m * LIMBS + l][n];
                    }
                    add(a, scales, n, b * MB + m, value_of<LIMBS>(sum), total + m * WIDE + (half + n) * LANES);
                }
        }
}

#if !defined(__AVX512BF16__)
struct Codebook {
#if defined(__AVX512F__)
    __m512 all;
    explicit Codebook(const float* t) : all(_mm512_loadu_ps(t)) {}
    QK_INLINE F at(const Codebook& t, I words, int shift) {
        F r;  // a permutation reads the low four bits of each index
        r.v[0] = (RawF)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words.v[0], (unsigned)shift), t.all);
        return r;
    }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Codebook(const float* t) : low(_mm256_loadu_ps(t)), high(_mm256_loadu_ps(t + 8)) {}
    QK_INLINE F at(const Codebook& t, I words, int shift) {
        F r;
        QK_EACH {
            const __m256i i = _mm256_srli_epi32((__m256i)words.v[p], shift);
            const __m256 upper = (__m256)_mm256_slli_epi32(i, 28);  // bit 3 of the code as the sign
            r.v[p] = (RawF)_mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i), upper);
        }
        return r;
    }
#else
    const float* all;
    explicit Codebook(const float* t) : all(t) {}
    QK_INLINE F at(const Codebook& t, I words, int shift) {
        uint32_t w[LANES];
        float v[LANES];
        std::memcpy(w, &words, sizeof w);
        for (int i = 0; i < LANES; ++i) v[i] = t.all[(w[i] >> shift) & 15];
        return load(v);
    }
#endif
};
#endif

// The same for a codebook. x: Layout::FLOATS, or with AVX-512 BF16 Layout::PAIRS.
template <int MB>
void table_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
#if defined(__AVX512BF16__)
    const HalfCodebook table(a.table);
    typedef uint16_t X;
#else
    const Codebook table(a.table);
    typedef float X;
#endif
    for (int64_t b = first; b < last; ++b)
        for (int half = 0; half < 2 / N16; ++half) {
            const Block block = a.blocks[b];
            const uint32_t* w = a.codes + block.start * WIDE + half * LANES;
            const X* x = (const X*)a.x + block.start * 8 * MB;
            F acc[MB][N16];
#pragma GCC unroll 8
            for (int m = 0; m < MB; ++m)
#pragma GCC unroll 2
                for (int n = 0; n < N16; ++n) acc[m][n] = splat(0.0f);
            for (int64_t step = 0; step < block.steps; ++step, w += WIDE, x += 8 * MB) {
                I word[N16];
#pragma GCC unroll 2
                for (int n = 0; n < N16; ++n) {
                    fetch_ahead(w + n * LANES, a.end);
                    word[n] = load(w + n * LANES);
                }
#if defined(__AVX512BF16__)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    I value[N16];
#pragma GCC unroll 2
                    for (int n = 0; n < N16; ++n) value[n] = HalfCodebook::at(table, word[n], 4 * j);
#pragma GCC unroll 8
                    for (int m = 0; m < MB; ++m) {
                        const I pair = splat32(x + 2 * (j * MB + m));
#pragma GCC unroll 2
                        for (int n = 0; n < N16; ++n) acc[m][n] = add_pairs(acc[m][n], value[n], pair);
                    }
                }
#else
#if defined(__AVX2__)
#pragma GCC unroll 8
#endif
                for (int k = 0; k < 8; ++k) {
                    const int nibble = k < 4 ? 2 * k : 2 * k - 7;
                    F value[N16];
#pragma GCC unroll 2
                    for (int n = 0; n < N16; ++n) value[n] = Codebook::at(table, word[n], 4 * nibble);
#pragma GCC unroll 8
                    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 2
                        for (int n = 0; n < N16; ++n) acc[m][n] = fused(value[n], splat(x[k * MB + m]), acc[m][n]);
                }
#endif
            }
#pragma GCC unroll 2
            for (int n = 0; n < N16; ++n) {
                const F s = load_scale(a.scale, block.group * WIDE + half * LANES + n * LANES, a.scale_dtype);
#pragma GCC unroll 8
                for (int m = 0; m < MB; ++m) {
                    float* to = total + m * WIDE + half * LANES + n * LANES;
                    store(to, fused(acc[m][n], s, load(to)));
                }
            }
        }
}

// ---- which tile ----------------------------------------------------------------------------------------------------

// Virtual rows whose accumulators fit in registers: 32 of them with AVX-512 and on aarch64, 16 elsewhere.
// QKIT_FEW_TILES: for tests that must compile soon.
#if defined(QKIT_FEW_TILES) || (defined(__SSE2__) && !defined(__AVX2__))
constexpr int MOST = 2;
#else
constexpr int MOST = N16 == 2 ? 12 : 4;
#endif

template <int BITS, int LIMBS, int MB>
constexpr Tile tile_if() {
    if constexpr (MB == 1 || MB * LIMBS <= MOST) return {tile<BITS, LIMBS, MB>, Layout::QUADS};
    else return {nullptr, Layout::QUADS};
}

template <int BITS, int LIMBS>
Tile tile_of(int64_t rows) {
    switch (rows) {
        case 1: return tile_if<BITS, LIMBS, 1>();
        case 2: return tile_if<BITS, LIMBS, 2>();
        case 3: return tile_if<BITS, LIMBS, 3>();
        case 4: return tile_if<BITS, LIMBS, 4>();
        case 6: return tile_if<BITS, LIMBS, 6>();
        case 8: return tile_if<BITS, LIMBS, 8>();
        case 12: return tile_if<BITS, LIMBS, 12>();
    }
    return {nullptr, Layout::QUADS};
}

#if defined(__AVX512BF16__)
constexpr Layout CODEBOOK = Layout::PAIRS;
#else
constexpr Layout CODEBOOK = Layout::FLOATS;
#endif

template <int MB>
constexpr Tile table_tile_if() {
    if constexpr (MB <= (MOST < 8 ? MOST : 8)) return {table_tile<MB>, CODEBOOK};
    else return {nullptr, CODEBOOK};
}

Tile pick(int bits, int limbs, int64_t rows) {
#if defined(__AVX512BF16__)
    if (limbs == 0 && rows >= qkit::STRIP) return wide_tile_of(bits, rows);
#endif
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(QK_VNNI_256)
    switch (limbs * 16 + bits) {
        case 16 + 4: return tile_of<4, 1>(rows);  // two products of a 4-bit code and a byte fit 16 bits
        case 16 + 8: return short_tile_of<8, 1>(rows);
        case 32 + 4: return short_tile_of<4, 2>(rows);
        case 32 + 8: return short_tile_of<8, 2>(rows);
        case 48 + 4: return short_tile_of<4, 3>(rows);
        case 48 + 8: return short_tile_of<8, 3>(rows);
    }
#else
#if defined(QK_VNNI_256)
    if (limbs > 1 && rows >= qkit::SHORT_STRIP) {
        if (limbs == 2) return bits == 4 ? short_tile_of<4, 2>(rows) : short_tile_of<8, 2>(rows);
        return bits == 4 ? short_tile_of<4, 3>(rows) : short_tile_of<8, 3>(rows);
    }
#endif
    switch (limbs * 16 + bits) {
        case 16 + 4: return tile_of<4, 1>(rows);
        case 16 + 8: return tile_of<8, 1>(rows);
        case 32 + 4: return tile_of<4, 2>(rows);
        case 32 + 8: return tile_of<8, 2>(rows);
        case 48 + 4: return tile_of<4, 3>(rows);
        case 48 + 8: return tile_of<8, 3>(rows);
    }
#endif
    if (limbs == 0 && bits == 4) switch (rows) {
        case 1: return table_tile_if<1>();
        case 2: return table_tile_if<2>();
        case 4: return table_tile_if<4>();
        case 8: return table_tile_if<8>();
    }
    return {nullptr, CODEBOOK};
}

}  // namespace
