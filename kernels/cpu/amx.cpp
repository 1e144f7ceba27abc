// AMX on top of avx512bf16.cpp, for many rows of integer weights. A tile of 16 rows x 64 inputs (one limb of each)
// times 64 inputs x 16 outputs. The second operand is [inputs / 4][outputs][4] unsigned bytes: what 8-bit codes are in
// the layout of matmul.h, and what 4-bit codes become by splitting nibbles. The sums, and so the results, are those of
// the other levels, bit for bit.
//
// Written without a machine that has AMX: it has run only as amx_tiles.h emulates it, and its speed is not known.
#include "levels.h"
#include "scales.h"
#include "amx_tiles.h"

namespace {

using qkit::Block;
using qkit::Layout;
using qkit::Tile;

constexpr int64_t ROWS = 16, MOST_ROWS = 48, DEEP = 64;  // of a tile, of a call, inputs of a tile
constexpr int64_t LINE = WIDE * 4;                       // bytes of four inputs' codes

// One block's codes as bytes [inputs / 4][32][4], up to a multiple of 64 inputs; what lies beyond the block meets zeros.
template <int BITS>
const uint8_t* operand(const uint32_t* codes, int64_t steps, uint8_t* buffer) {
    if (BITS == 8) {
        if (steps * 8 % DEEP == 0) return (const uint8_t*)codes;
        std::memcpy(buffer, codes, (size_t)(steps * 2 * LINE));
        return buffer;
    }
    const I nibble = splat(0x0f0f0f0f);
    for (int64_t step = 0; step < steps; ++step)
        for (int64_t n = 0; n < WIDE; n += LANES) {
            const I word = load(codes + step * WIDE + n);
            uint32_t* to = (uint32_t*)buffer + step * 2 * WIDE + n;
            store(to, word & nibble);
            store(to + WIDE, (word >> 4) & nibble);
        }
    return buffer;
}

// sums [2][16][32] = two tiles of activations (16 rows each, `stride` apart) times a block of codes.
void two(const int8_t* x, int64_t stride, const uint8_t* codes, int64_t inputs, uint32_t* sums) {
    const int8_t* second = x + ROWS * stride;
    QK_TILE_ZERO(0);
    QK_TILE_ZERO(1);
    QK_TILE_ZERO(2);
    QK_TILE_ZERO(3);
    for (int64_t k = 0; k < inputs; k += DEEP) {
        const uint8_t* w = codes + k / 4 * LINE;
        QK_TILE_LOAD(4, x + k, stride);
        QK_TILE_LOAD(6, w, LINE);
        QK_TILE_LOAD(7, w + LINE / 2, LINE);
        QK_TILE_MULTIPLY(0, 4, 6);
        QK_TILE_MULTIPLY(1, 4, 7);
        QK_TILE_LOAD(5, second + k, stride);
        QK_TILE_MULTIPLY(2, 5, 6);
        QK_TILE_MULTIPLY(3, 5, 7);
    }
    QK_TILE_STORE(0, sums, LINE);
    QK_TILE_STORE(1, sums + LANES, LINE);
    QK_TILE_STORE(2, sums + ROWS * WIDE, LINE);
    QK_TILE_STORE(3, sums + ROWS * WIDE + LANES, LINE);
}

void one(const int8_t* x, int64_t stride, const uint8_t* codes, int64_t inputs, uint32_t* sums) {
    QK_TILE_ZERO(0);
    QK_TILE_ZERO(1);
    for (int64_t k = 0; k < inputs; k += DEEP) {
        const uint8_t* w = codes + k / 4 * LINE;
        QK_TILE_LOAD(4, x + k, stride);
        QK_TILE_LOAD(6, w, LINE);
        QK_TILE_LOAD(7, w + LINE / 2, LINE);
        QK_TILE_MULTIPLY(0, 4, 6);
        QK_TILE_MULTIPLY(1, 4, 7);
    }
    QK_TILE_STORE(0, sums, LINE);
    QK_TILE_STORE(1, sums + LANES, LINE);
}

template <int BITS, int LIMBS>
void multiply(const TileArgs& a, int64_t first, int64_t last, float* total) {
    static_assert(N16 * LANES == WIDE, "a row of sums at a time");
    TileConfig config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
        config.row_bytes[t] = 64;
        config.rows[t] = ROWS;
    }
    QK_TILE_CONFIGURE(config);

    alignas(64) uint8_t buffer[128 / 4 * LINE] = {};
    alignas(64) uint32_t sums[MOST_ROWS / ROWS * LIMBS][ROWS * WIDE];
    const int64_t units = a.rows / ROWS * LIMBS, unit = ROWS * a.row_bytes;
    for (int64_t b = first; b < last; ++b) {
        const Block block = a.blocks[b];
        const int64_t inputs = block.steps * 8;
        const uint8_t* codes = operand<BITS>(a.codes + block.start * WIDE * BITS / 4, block.steps, buffer);
        const int8_t* x = (const int8_t*)a.x + b * units * unit;
        int64_t u = 0;
        for (; u + 2 <= units; u += 2) two(x + u * unit, a.row_bytes, codes, inputs, sums[u]);
        if (u < units) one(x + u * unit, a.row_bytes, codes, inputs, sums[u]);
        Scales scales;
        scales_of(a, b, 0, scales);
        for (int64_t m = 0; m < a.rows; ++m)
            for (int n = 0; n < N16; ++n) {
                I sum[LIMBS];
                for (int l = 0; l < LIMBS; ++l)
                    sum[l] = load(sums[m / ROWS * LIMBS + l] + m % ROWS * WIDE + n * LANES) +
                             splat(a.start[(b * a.rows + m) * LIMBS + l]);
                add(a, scales, n, b * a.rows + m, value_of<LIMBS>(sum), total + m * WIDE + n * LANES);
            }
    }
    QK_TILE_RELEASE();  // a thread with tiles in use costs the system more at every switch
}

}  // namespace

namespace qkit {

Tile amx_tile(int bits, int limbs, int64_t rows) {
    if (limbs == 0 || rows % ROWS || rows > MOST_ROWS) return avx512bf16_tile(bits, limbs, rows);
    switch (limbs * 16 + bits) {
        case 16 + 4: return {multiply<4, 1>, Layout::ROWS};
        case 16 + 8: return {multiply<8, 1>, Layout::ROWS};
        case 32 + 4: return {multiply<4, 2>, Layout::ROWS};
        case 32 + 8: return {multiply<8, 2>, Layout::ROWS};
        case 48 + 4: return {multiply<4, 3>, Layout::ROWS};
        case 48 + 8: return {multiply<8, 3>, Layout::ROWS};
    }
    return {nullptr, Layout::ROWS};
}

}  // namespace qkit
