// Fixed-point activations as 16-bit integers, where bytes gain nothing: without AVX-VNNI, and for many rows with it. One or
// two limbs are one integer, a third is the low byte beside it: the sums are those of the limbs (matmul.h), bit for bit. A
// few rows meet the codes as these are unpacked; for many the codes of up to 128 inputs are unpacked once and serve the
// rows six at a time. x: Layout::SHORTS.
#pragma once
#include "lanes.h"
#include "matmul_types.h"
#include "pairs.h"
#include "scales.h"

namespace {

using qkit::Block;
using qkit::Layout;
using qkit::SHORT_STRIP;
using qkit::Tile;

// Pair j of a word's codes as 16-bit integers, in the order of Layout::PAIRS; next: the word after 32 others, of 8-bit codes.
template <int BITS>
QK_INLINE I codes_of(I word, I next, int j) {
    const I from = BITS == 4 || !(j & 1) ? word : next;
    const int shift = BITS == 4 ? 4 * j : 8 * (j >> 1);
    const I low = shift ? shift_halves(from, shift) : from;
    return shift + BITS == 16 ? low : low & splat(BITS == 4 ? 0x000f000f : 0x00ff00ff);
}

// sum[ROWS][V vectors of outputs] += x [pairs][ROWS] times the codes.
template <int BITS, int ROWS, int V>
QK_INLINE void add_few(const uint32_t* x, const uint32_t* codes, const uint32_t* end, int64_t steps, I (*sum)[V]) {
    for (int64_t step = 0; step < steps; ++step, codes += WIDE * BITS / 4, x += 4 * ROWS) {
        I word[V], next[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            fetch_ahead(codes + v * LANES, end);
            if (BITS == 8) fetch_ahead(codes + WIDE + v * LANES, end);
            word[v] = load(codes + v * LANES);
            next[v] = BITS == 8 ? load(codes + WIDE + v * LANES) : word[v];
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            I pair[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) pair[v] = codes_of<BITS>(word[v], next[v], j);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const I both = splat32(x + j * ROWS + r);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) sum[r][v] = dot2(sum[r][v], pair[v], both);
            }
        }
    }
}

// sum[rows of a strip] += x [pairs][rows of a strip] times sixteen outputs of w.
QK_INLINE void add_strip(const uint32_t* x, const uint32_t* w, int64_t pairs, I (*sum)[1]) {
    for (int64_t p = 0; p < pairs; ++p, w += WIDE, x += SHORT_STRIP) {
        const I codes = load(w);
#pragma GCC unroll 6
        for (int m = 0; m < SHORT_STRIP; ++m) sum[m][0] = dot2(sum[m][0], codes, splat32(x + m));
    }
}

// A block's codes as pairs, [inputs / 2][32].
template <int BITS>
void unpack_shorts(const uint32_t* codes, const uint32_t* end, int64_t steps, uint32_t* to) {
    for (int64_t step = 0; step < steps; ++step, to += 4 * WIDE)
        for (int v = 0; v < 2; ++v) {
            const uint32_t* from = codes + step * WIDE * BITS / 4 + v * LANES;
            fetch_ahead(from, end);
            if (BITS == 8) fetch_ahead(from + WIDE, end);
            const I word = load(from), next = BITS == 8 ? load(from + WIDE) : word;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) store(to + j * WIDE + v * LANES, codes_of<BITS>(word, next, j));
        }
}

// total += the products of a block of inputs, ROWS rows from m on and the V * 16 outputs from `first` on.
// add_words(x, sum): those of one 16-bit integer an input.
template <int LIMBS, int ROWS, int V, class AddWords>
QK_INLINE void add_rows(const TileArgs& a, const Scales* scales, int64_t b, int64_t m, int64_t first, float* total,
                        AddWords add_words) {
    constexpr int WORDS = LIMBS > 2 ? 2 : 1;
    const int64_t row = b * a.rows + m;
    I sum[WORDS][ROWS][V];
#pragma GCC unroll 2
    for (int k = 0; k < WORDS; ++k) {
        I here[ROWS][V];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) here[r][v] = splat(a.start[(row + r) * WORDS + k]);
        add_words((const uint32_t*)a.x + (m / ROWS * WORDS + k) * a.strip + a.blocks[b].start * 4 * ROWS, here);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[k][r][v] = here[r][v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const I upper = sum[WORDS - 1][r][v];
            const F value = WORDS == 2 ? joined(upper, sum[0][r][v]) : to_float(upper);
            add(a, scales[v], 0, row + r, value, total + (m + r) * WIDE + first + v * LANES);
        }
}

template <int BITS, int LIMBS, int ROWS>
void few_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    constexpr int V = ROWS == 1 ? 2 : 1;  // registers
    for (int64_t b = first; b < last; ++b)
        for (int64_t n = 0; n < WIDE; n += V * LANES) {
            const Block block = a.blocks[b];
            const uint32_t* codes = a.codes + block.start * WIDE * BITS / 4 + n;
            Scales scales[V];
            for (int v = 0; v < V; ++v)
                if (ROWS == 1) scales_here(a, b, n + v * LANES, scales[v]);
                else scales_of(a, b, n + v * LANES, scales[v]);
            add_rows<LIMBS, ROWS, V>(a, scales, b, 0, n, total, [&](const uint32_t* x, I (*sum)[V]) QK_INLINED {
                add_few<BITS, ROWS, V>(x, codes, a.end, block.steps, sum);
            });
        }
}

template <int BITS, int LIMBS>
void many_tile(const TileArgs& a, int64_t first, int64_t last, float* total) {
    alignas(64) uint32_t w[qkit::BLOCK_INPUTS / 2 * WIDE];
    for (int64_t b = first; b < last; ++b) {
        const Block block = a.blocks[b];
        unpack_shorts<BITS>(a.codes + block.start * WIDE * BITS / 4, a.end, block.steps, w);
        for (int64_t n = 0; n < WIDE; n += LANES) {
            Scales scales;
            scales_of(a, b, n, scales);
            for (int64_t m = 0; m < a.rows; m += SHORT_STRIP)
                add_rows<LIMBS, SHORT_STRIP, 1>(a, &scales, b, m, n, total, [&](const uint32_t* x, I (*sum)[1]) QK_INLINED {
                    add_strip(x, w + n, block.steps * 4, sum);
                });
        }
    }
}

template <int BITS, int LIMBS>
Tile short_tile_of(int64_t rows) {
    switch (rows) {
        case 1: return {few_tile<BITS, LIMBS, 1>, Layout::SHORTS};
        case 2: return {few_tile<BITS, LIMBS, 2>, Layout::SHORTS};
        case 3: return {few_tile<BITS, LIMBS, 3>, Layout::SHORTS};
        case 4: return {few_tile<BITS, LIMBS, 4>, Layout::SHORTS};
    }
    return {rows % SHORT_STRIP ? nullptr : many_tile<BITS, LIMBS>, Layout::SHORTS};
}

}  // namespace
