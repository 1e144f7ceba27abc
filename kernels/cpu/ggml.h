// Weights -> ggml's blocks, sixteen rows at a time: fitted (ggml_fit.h), and packed as kernels/ggml/layout.py does.
#pragma once
#include <cstring>

#include "ggml_fit.h"
#include "transposes.h"

namespace {

// Of `n` bytes in each lane fields of `bits` bits: of a byte of the result's one from each of as many runs. No shift moves a bit
// from one byte to another that the mask keeps.
QK_INLINE void put_fields(const QkPiece& p, const uint8_t (*from)[LANES], int n, uint8_t (*to)[LANES]) {
    typedef uint32_t Words __attribute__((vector_size(LANES)));
    const int per = 8 / p.bits;
    const Words mask = ((1u << p.bits) - 1) * 0x01010101u - Words{};
    for (int start = 0; start < n; start += p.run * per)
        for (int i = start; i < start + p.run; ++i, ++to) {
            Words all{};
            for (int k = 0; k < per; ++k) {
                Bytes one;
                std::memcpy(&one, from[i + k * p.run], sizeof one);
                all |= (((Words)(one + (uint8_t)p.add) >> p.shift) & mask) << (p.bits * k);
            }
            std::memcpy(*to, &all, sizeof all);
        }
}

// Eight 6-bit scales and minima in 12 bytes: layout._scale_min.
QK_INLINE void put_scale_min(const uint8_t (*s)[LANES], uint8_t (*to)[LANES]) {
    const uint8_t (*m)[LANES] = s + 8;
    for (int k = 0; k < 4; ++k)
        for (int r = 0; r < LANES; ++r) {
            to[k][r] = (uint8_t)((s[k][r] & 63) | (s[k + 4][r] >> 4) << 6);
            to[k + 4][r] = (uint8_t)((m[k][r] & 63) | (m[k + 4][r] >> 4) << 6);
            to[k + 8][r] = (uint8_t)((s[k + 4][r] & 15) | (m[k + 4][r] & 15) << 4);
        }
}

// The bytes of a block.
void pack_block(const QkGrid& g, const Fitted& made, uint8_t (*to)[LANES]) {
    const int size = g.most ? SUPER : g.sub, subs = size / g.sub;
    for (const QkPiece* p = g.pieces; p < g.pieces + g.n_pieces; ++p) {
        int bytes = 12;
        if (p->part == QK_D || p->part == QK_DMIN) {
            const uint16_t* half = p->part == QK_D ? made.d : made.dmin;
            bytes = p->part == QK_D && g.power ? 1 : 2;
            for (int k = 0; k < bytes; ++k)
                for (int r = 0; r < LANES; ++r) to[k][r] = (uint8_t)(half[r] >> (8 * k));
        } else if (p->part == QK_SCALE_MIN) {
            put_scale_min(made.scales, to);
        } else {
            const bool codes = p->part == QK_CODES;
            const int n = codes ? size : g.affine ? 2 * subs : subs;
            put_fields(*p, codes ? made.codes : made.scales, n, to);
            bytes = n * p->bits / 8;
        }
        to += bytes;
    }
}

// n <= 16 rows; `a` points to where the first one's results go. A slab of columns is turned, so that rows are lanes, its blocks
// are fitted and packed there, and their bytes are turned back.
template <class W, bool TABLE>
void ggml_rows(const qkit::GgmlArgs& a, const typename W::T* w, uint8_t* out, int64_t n) {
    typedef SubBlock<TABLE, sizeof(typename W::T) == 2> Sub;
    const QkGrid& g = a.grid;
    const int size = g.most ? SUPER : g.sub;
    const int64_t row_bytes = a.cols / size * a.block_bytes;
    float x[SUPER][LANES];
    uint8_t codes[SUPER][LANES], packed[2 * SUPER][LANES];
    Fitted made;
    made.codes = codes;
    double sums[2] = {0.0, 0.0};
    for (int64_t c = 0; c < a.cols; c += SUPER) {
        const int columns = a.cols - c < SUPER ? (int)(a.cols - c) : SUPER;
        for (int j = 0; j < columns; j += LANES) {
            F tile[LANES];
            for (int r = 0; r < LANES; ++r) tile[r] = r < n ? W::load16(w + r * a.cols + c + j) : splat(0.0f);
            transpose(tile);
            for (int k = 0; k < LANES; ++k) store(x[j + k], tile[k]);
        }
        int bytes = 0;
        for (int j = 0; j < columns; j += size, bytes += a.block_bytes) {
            const Sub block{g, x + j, a.weight ? a.weight + c + j : nullptr};
            F lost = splat(0.0f), total = splat(0.0f);
            if (g.most) fit_super(block, made, lost, total);
            else fit_alone(block, made, lost, total);
            float lanes[2][LANES];
            store(lanes[0], lost);
            store(lanes[1], total);
            for (int64_t r = 0; r < n; ++r) sums[0] += (double)lanes[0][r], sums[1] += (double)lanes[1][r];
            if (TABLE && g.stored)
                for (uint8_t* code = codes[0]; code < codes[size]; ++code) *code = g.stored[*code];
            pack_block(g, made, packed + bytes);
        }
        uint8_t* to = out + c / size * a.block_bytes;
        for (int b = 0; b < bytes; b += LANES) {
            Bytes tile[LANES];
            std::memcpy(tile, packed[b], sizeof tile);  // beyond `bytes` it is anything, and not written
            transpose(tile);
            const size_t count = (size_t)(bytes - b < LANES ? bytes - b : LANES);
            for (int64_t r = 0; r < n; ++r) {
                if (count == LANES) std::memcpy(to + r * row_bytes + b, &tile[r], LANES);
                else std::memcpy(to + r * row_bytes + b, &tile[r], count);
            }
        }
    }
    uint32_t outside[LANES];
    store(outside, made.outside);
    a.stats[0] = sums[0];
    a.stats[1] = sums[1];
    a.stats[2] = 0.0;
    for (const uint32_t lane : outside) a.stats[2] += (double)(lane & 1);
}

void ggml(const qkit::GgmlArgs& a, const void* w, uint8_t* out, int64_t n) {
    const bool table = a.grid.n_levels != 0;
    switch (a.w_dtype) {
        case QK_F32:
            return table ? ggml_rows<F32, true>(a, (const float*)w, out, n)
                         : ggml_rows<F32, false>(a, (const float*)w, out, n);
        case QK_F16:
            return table ? ggml_rows<F16, true>(a, (const uint16_t*)w, out, n)
                         : ggml_rows<F16, false>(a, (const uint16_t*)w, out, n);
        default:
            return table ? ggml_rows<BF16, true>(a, (const uint16_t*)w, out, n)
                         : ggml_rows<BF16, false>(a, (const uint16_t*)w, out, n);
    }
}

}  // namespace
