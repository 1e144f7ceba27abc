// Activations times a prepacked weight. The weight's layout (qk_prepack) serves every number of activations and every
// ISA: blocks of 32 outputs; in each, for every eight inputs, 32 words of 4-bit codes (or twice 32 words of 8-bit
// codes), one word an output: lanes are outputs, no sum ever crosses a lane, and one thread reads one stream.
//   4 bits: byte b of a word holds input b in its low and input 4 + b in its high nibble
//   8 bits: byte b of the first 32 words holds input b, of the second 32 words input 4 + b
//
// Integer weights: activations become fixed point, per row and block of at most 128 inputs (never more than a group):
// a scale and one, two or three signed bytes ("limbs") an input. A limb times four codes is one dot4, the sums are exact
// integers, and scales are applied once a block. Two limbs (error 2**-16 of the block's largest input) carry bfloat16
// and float16 inputs, three (2**-24) float32; one is int8 activations, whose scale is that of the whole row.
// A tile is MB rows of activations; MB * LIMBS "virtual rows" share one pass over the codes.
//
// Codebooks (16 floats): values are looked up lane by lane and multiplied in float, with AVX-512 BF16 in pairs of bfloat16.
#pragma once
#include <cmath>

#include "lanes.h"
#include "matmul_types.h"
#include "qkit_cpu.h"

namespace {

using qkit::Block;
using qkit::PrepareArgs;
using qkit::TileArgs;
using qkit::WIDE;

constexpr int N16 = REGISTER_BYTES == 64 ? 2 : 1;  // vectors of sixteen outputs in flight

QK_INLINE I splat32(const void* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    return splat(word);
}

QK_INLINE F load_scale(const void* scale, int64_t i, int dtype) {
    if (dtype == QK_F32) return load((const float*)scale + i);
    const uint16_t* h = (const uint16_t*)scale + i;
    return dtype == QK_BF16 ? BF16::load16(h) : F16::load16(h);
}

// total[m][32] += this tile's products over blocks first .. last.
template <int BITS, int LIMBS, int MB>
void tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    constexpr int V = MB * LIMBS;
    // Few accumulators would wait for one another: the low and the high inputs then have their own.
    constexpr int SETS = V * N16 * PARTS <= 4 ? 2 : 1;
    constexpr int STEP = BITS == 4 ? WIDE : 2 * WIDE;
    const I nibble = splat(0x0f0f0f0f);

    for (int half = 0; half < 2 / N16; ++half)
        for (int64_t b = first; b < last; ++b) {
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
#pragma GCC unroll 2
            for (int n = 0; n < N16; ++n) {
                const int64_t at = block.group * WIDE + half * LANES + n * LANES;
                const F s = load_scale(a.scale, at, a.scale_dtype);
                const F sz = a.zero ? s * to_float(load_u8(a.zero + at)) : s;
#pragma GCC unroll 16
                for (int m = 0; m < MB; ++m) {
                    I sum[LIMBS];
#pragma GCC unroll 3
                    for (int l = 0; l < LIMBS; ++l) {
                        sum[l] = acc[0][m * LIMBS + l][n];
                        if (SETS == 2) sum[l] = sum[l] + acc[SETS - 1][m * LIMBS + l][n];
                    }
                    I fixed = sum[0];
                    if (LIMBS > 1) fixed = fixed + (sum[LIMBS > 1] << 8);
                    F value = to_float(fixed);
                    if (LIMBS > 2) value = fused(to_float(sum[LIMBS - 1]), splat(65536.0f), value);
                    float* to = total + m * WIDE + half * LANES + n * LANES;
                    F t = fused(value, s * splat(a.x_scale[b * MB + m]), load(to));
                    if (a.zero) t = fused(sz, splat(-a.x_sum[b * MB + m]), t);
                    store(to, t);
                }
            }
        }
}

#if !defined(__AVX512BF16__)
struct Table {
#if defined(__AVX512F__)
    __m512 all;
    explicit Table(const float* t) : all(_mm512_loadu_ps(t)) {}
    QK_INLINE F at(const Table& t, I words, int shift) {
        F r;  // a permutation reads the low four bits of each index
        r.v[0] = (RawF)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words.v[0], (unsigned)shift), t.all);
        return r;
    }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Table(const float* t) : low(_mm256_loadu_ps(t)), high(_mm256_loadu_ps(t + 8)) {}
    QK_INLINE F at(const Table& t, I words, int shift) {
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
    explicit Table(const float* t) : all(t) {}
    QK_INLINE F at(const Table& t, I words, int shift) {
        uint32_t w[LANES];
        float v[LANES];
        std::memcpy(w, &words, sizeof w);
        for (int i = 0; i < LANES; ++i) v[i] = t.all[(w[i] >> shift) & 15];
        return load(v);
    }
#endif
};
#endif

// The same for a codebook. x: float [inputs][MB], or, in pairs, bfloat16 [inputs / 8][4][MB][2]: pair j of eight inputs is
// what nibbles j of a word's two halves meet, inputs 0 2, 4 6, 1 3, 5 7.
template <int MB>
void table_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
#if defined(__AVX512BF16__)
    alignas(64) uint16_t half_table[32];
    for (int i = 0; i < 32; ++i) half_table[i] = to_bf16(a.table[i & 15]);  // twice: the index has five bits
    const __m512i table = _mm512_load_si512(half_table);
    typedef uint16_t X;
#else
    const Table table(a.table);
    typedef float X;
#endif
    for (int half = 0; half < 2 / N16; ++half)
        for (int64_t b = first; b < last; ++b) {
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
                for (int n = 0; n < N16; ++n) word[n] = load(w + n * LANES);
#if defined(__AVX512BF16__)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    __m512i value[N16];
#pragma GCC unroll 2
                    for (int n = 0; n < N16; ++n)
                        value[n] = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)word[n].v[0], 4 * j), table);
#pragma GCC unroll 8
                    for (int m = 0; m < MB; ++m) {
                        const __m512bh pair = (__m512bh)(__m512i)splat32(x + 2 * (j * MB + m)).v[0];
#pragma GCC unroll 2
                        for (int n = 0; n < N16; ++n)
                            acc[m][n].v[0] = (RawF)_mm512_dpbf16_ps((__m512)acc[m][n].v[0], (__m512bh)value[n], pair);
                    }
                }
#else
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) {
                    const int nibble = k < 4 ? 2 * k : 2 * k - 7;
                    F value[N16];
#pragma GCC unroll 2
                    for (int n = 0; n < N16; ++n) value[n] = Table::at(table, word[n], 4 * nibble);
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

// ---- activations ---------------------------------------------------------------------------------------------------

QK_INLINE F magnitude(F x) { return from_bits(bits_of(x) & splat(0x7fffffff)); }

template <class W>
QK_INLINE F input16(const typename W::T* x, int64_t i, int64_t n) {
    return i >= n ? splat(0.0f) : load_padded<W>(x, i, n);
}

// The largest magnitude of x[0 .. n); infinity where one is NaN or infinite.
template <class W>
QK_INLINE float largest(const typename W::T* x, int64_t n) {
    F most = splat(0.0f);
    I bad = splat(0);
    for (int64_t i = 0; i < n; i += LANES) {
        const F v = magnitude(input16<W>(x, i, n));
        most = max(v, most);
        bad = bad | greater(bits_of(v), splat(0x7f7fffff));
    }
    float f[LANES];
    int32_t any[LANES];
    store(f, most);
    std::memcpy(any, &bad, sizeof any);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) {
            f[i] = f[i + half] > f[i] ? f[i + half] : f[i];
            any[i] |= any[i + half];
        }
    return any[0] ? INFINITY : f[0];
}

QK_INLINE int32_t sum(I x) {
    int32_t v[LANES];
    std::memcpy(v, &x, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

// Four bytes of each of four quads of inputs, `stride` apart.
QK_INLINE void scatter(int8_t* to, I x, int64_t stride, int64_t quads) {
    uint8_t bytes[LANES];
    store_u8(bytes, x);
    for (int64_t q = 0; q < quads; ++q) std::memcpy(to + q * stride, bytes + 4 * q, 4);
}

// Row m of a tile as fixed point. cols may end within the last block: the rest is zero.
template <class W, int LIMBS>
void fix(const PrepareArgs& a, const typename W::T* x, int64_t m) {
    constexpr float STEPS = LIMBS == 1 ? 127.0f : LIMBS == 2 ? 32512.0f : 8323072.0f;  // 127 * 256**(LIMBS - 1)
    const int64_t v0 = m * LIMBS, width = a.rows * LIMBS;
    const float whole = LIMBS == 1 ? largest<W>(x, a.cols) : 0.0f;
    for (int64_t b = 0; b < a.n_blocks; ++b) {
        const int64_t begin = a.blocks[b].start * 8, size = a.blocks[b].steps * 8;
        const int64_t here = begin + size <= a.cols ? size : a.cols - begin;
        const typename W::T* from = x + begin;
        const float most = LIMBS == 1 ? whole : largest<W>(from, here);
        const bool finite = most < INFINITY;
        float scale = finite ? most / STEPS : 1.0f;
        if (scale < 1e-30f) scale = LIMBS == 1 && scale > 0.0f ? scale : 1.0f;  // nothing: never divide by a subnormal
        const F s = splat(scale), magic = splat(MAGIC);
        I total[LIMBS];
        for (int l = 0; l < LIMBS; ++l) total[l] = splat(0);
        int8_t* to = (int8_t*)a.x + begin * width + 4 * v0;
        for (int64_t i = 0; i < size; i += LANES) {
            F t = input16<W>(from, i, here) / s;
            if (!finite) t = splat(0.0f);
            const int64_t quads = size - i < LANES ? (size - i) / 4 : 4;
            I fixed;
            if (LIMBS == 3) {  // beyond the magic number's 22 bits: first the upper part
                const F upper = (t * splat(0x1p-8f) + magic) - magic;
                fixed = ((bits_of(upper + magic) - splat((int)as_bits(MAGIC))) << 8) +
                        (bits_of((t - upper * splat(256.0f)) + magic) - splat((int)as_bits(MAGIC)));
            } else {
                fixed = bits_of(t + magic) - splat((int)as_bits(MAGIC));
            }
#pragma GCC unroll 3
            for (int l = 0; l < LIMBS; ++l) {
                const I limb = l == LIMBS - 1 ? fixed : (fixed << 24) >> 24;
                fixed = (fixed - limb) >> 8;
                total[l] = total[l] + limb;
                scatter(to + i * width + 4 * l, limb, 4 * width, quads);
            }
        }
        double value = 0.0, unit = 1.0;
        for (int l = 0; l < LIMBS; ++l, unit *= 256.0) {
            const int32_t limb_sum = sum(total[l]);
            a.start[b * width + v0 + l] = a.symmetric ? -a.middle * limb_sum : 0;
            value += unit * limb_sum;
        }
        const float bad = finite ? 0.0f : NAN;
        a.x_scale[b * a.rows + m] = scale + bad;
        a.x_sum[b * a.rows + m] = (float)(value * scale) + bad;
    }
}

// Row m of a tile for a codebook: as it is, at the place where its codes will be.
template <class W>
void spread(const PrepareArgs& a, const typename W::T* x, int64_t m) {
    const int64_t padded = a.blocks[a.n_blocks - 1].start * 8 + a.blocks[a.n_blocks - 1].steps * 8;
    for (int64_t i = 0; i < padded; ++i) {
        const float value = i < a.cols ? W::get(x + i) : 0.0f;
#if defined(__AVX512BF16__)
        const int64_t k = i % 8, pair = (k & 1) * 2 + (k >> 2), side = (k >> 1) & 1;
        ((uint16_t*)a.x)[((i / 8 * 4 + pair) * a.rows + m) * 2 + side] = to_bf16(value);
#else
        ((float*)a.x)[i * a.rows + m] = value;
#endif
    }
}

template <class W>
void prepare_row(const PrepareArgs& a, const typename W::T* x, int64_t m) {
    switch (a.limbs) {
        case 0: return spread<W>(a, x, m);
        case 1: return fix<W, 1>(a, x, m);
        case 2: return fix<W, 2>(a, x, m);
        default: return fix<W, 3>(a, x, m);
    }
}

void prepare(const PrepareArgs& a, const void* x, int x_dtype, int64_t m) {
    switch (x_dtype) {
        case QK_F32: return prepare_row<F32>(a, (const float*)x, m);
        case QK_F16: return prepare_row<F16>(a, (const uint16_t*)x, m);
        default: return prepare_row<BF16>(a, (const uint16_t*)x, m);
    }
}

// y[0 .. n) = total + bias, rounded once; n <= 32.
template <class W>
QK_INLINE void finish_row(const float* total, const typename W::T* bias, typename W::T* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = W::put(total[i] + (bias ? W::get(bias + i) : 0.0f));
}

void finish(const float* total, const void* bias, void* y, int dtype, int64_t n) {
    switch (dtype) {
        case QK_F32: return finish_row<F32>(total, (const float*)bias, (float*)y, n);
        case QK_F16: return finish_row<F16>(total, (const uint16_t*)bias, (uint16_t*)y, n);
        default: return finish_row<BF16>(total, (const uint16_t*)bias, (uint16_t*)y, n);
    }
}

// ---- which tile ----------------------------------------------------------------------------------------------------

typedef qkit::TileFn TileFn;

// Null where the accumulators would not fit in registers.
template <int BITS, int LIMBS, int MB>
TileFn tile_if() {
    if constexpr (MB * LIMBS <= (N16 == 2 ? 12 : 4)) return tile<BITS, LIMBS, MB>;
    else return nullptr;
}

template <int BITS, int LIMBS>
TileFn tile_of(int64_t rows) {
    switch (rows) {
        case 1: return tile_if<BITS, LIMBS, 1>();
        case 2: return tile_if<BITS, LIMBS, 2>();
        case 3: return tile_if<BITS, LIMBS, 3>();
        case 4: return tile_if<BITS, LIMBS, 4>();
        case 6: return tile_if<BITS, LIMBS, 6>();
        case 8: return tile_if<BITS, LIMBS, 8>();
        case 12: return tile_if<BITS, LIMBS, 12>();
        default: return nullptr;
    }
}

template <int MB>
TileFn table_tile_if() {
    if constexpr (MB <= (N16 == 2 ? 8 : 4)) return table_tile<MB>;
    else return nullptr;
}

TileFn pick(int bits, int limbs, int64_t rows) {
    switch (limbs * 16 + bits) {
        case 16 + 4: return tile_of<4, 1>(rows);
        case 16 + 8: return tile_of<8, 1>(rows);
        case 32 + 4: return tile_of<4, 2>(rows);
        case 32 + 8: return tile_of<8, 2>(rows);
        case 48 + 4: return tile_of<4, 3>(rows);
        case 48 + 8: return tile_of<8, 3>(rows);
    }
    if (limbs == 0 && bits == 4) switch (rows) {
        case 1: return table_tile_if<1>();
        case 2: return table_tile_if<2>();
        case 4: return table_tile_if<4>();
        case 8: return table_tile_if<8>();
    }
    return nullptr;
}

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

const qkit::MatmulKernels MATMUL = {pick, prepare, finish, PAIRS};

}  // namespace
