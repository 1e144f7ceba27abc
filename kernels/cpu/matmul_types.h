// What the driver (matmul_api.cpp) and the kernels of each ISA (matmul.h, amx.h, activations.h) share.
#pragma once
#include <cstdint>

namespace qkit {

constexpr int64_t WIDE = 32;  // outputs in a block of the layout
constexpr int64_t BLOCK_INPUTS = 128;  // inputs under one activation scale, at most
constexpr int STRIP = 12;              // rows of Layout::STRIPS
constexpr int SHORT_STRIP = 6;         // and, at most, of Layout::SHORTS

inline int64_t short_strip(int64_t rows) { return rows < SHORT_STRIP ? rows : SHORT_STRIP; }

// Consecutive inputs under one scale, at most 128; start and steps count eights of (padded) inputs.
struct Block {
    int64_t group, start, steps;
};

// How the inputs of a tile lie for its kernel. "Virtual rows" are rows times limbs (matmul.h).
enum class Layout {
    QUADS,   // fixed point: int8 [inputs / 4][virtual rows][4]
    ROWS,    // fixed point: int8 [blocks][rows / 16][limbs][16][row_bytes], zero padded
    FLOATS,  // codebook: float [inputs][rows]
    PAIRS,   // codebook: bfloat16 [inputs / 8][4][rows][2], see activations.h
    STRIPS,  // any codes: the same, by twelve rows: [rows / 12][inputs / 8][4][12][2]
    SHORTS,  // fixed point: int16 in the same order, by six rows, of fewer by these: [rows / 6][words][inputs / 8][4][6][2],
             // where three limbs are two words (short_tile.h)
};

// One tile of activations and one block of outputs. x, start, x_scale, x_sum: what `prepare` wrote for the tile.
struct TileArgs {
    const uint32_t* codes;  // of this block of outputs, in the layout of matmul.h
    const uint32_t* end;    // of the codes that this thread reads before it does something else
    const void* scale;      // [groups][32] of scale_dtype
    const uint8_t* zero;    // [groups][32] or null
    const float* table;     // sixteen values, or null for integers
    int scale_dtype;
    const Block* blocks;
    int64_t rows, row_bytes;
    int64_t strip;  // Layout::STRIPS and SHORTS: four bytes each, from one to the next
    const void* x;
    const int32_t* start;  // [blocks][virtual rows]: what the sums begin with
    const float* x_scale;  // [blocks][rows]
    const float* x_sum;    // [blocks][rows]: sum of the block's inputs
};

struct PrepareArgs {
    const Block* blocks;
    int64_t n_blocks, cols;
    int64_t rows, row_bytes;  // of the tile
    int64_t strip;            // as in TileArgs
    int limbs;                // 0: multiplied as floats
    Layout layout;
    bool symmetric;
    int32_t middle;  // 2**(bits-1)
    void* x;
    int32_t* start;
    float *x_scale, *x_sum;
};

// total[rows][32] += the products over these blocks.
typedef void (*TileFn)(const TileArgs&, int64_t first_block, int64_t last_block, float* total);

struct Tile {
    TileFn run;  // null: there is none
    Layout layout;
};

// The kernel for tiles of `rows` rows. limbs 0: activations are multiplied as floats, by a codebook's values or, with
// Layout::STRIPS, integers as well.
typedef Tile (*PickFn)(int bits, int limbs, int64_t rows);

// Null where this build or this machine lacks the ISA.
PickFn matmul_for(int isa);

}  // namespace qkit
