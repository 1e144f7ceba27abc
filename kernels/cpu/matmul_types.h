// What the driver (matmul_api.cpp) and the kernels of each ISA (matmul.h) share.
#pragma once
#include <cstdint>

namespace qkit {

constexpr int64_t WIDE = 32;  // outputs in a block of the layout

// Consecutive inputs under one scale, at most 128; start and steps count eights of (padded) inputs.
struct Block {
    int64_t group, start, steps;
};

// One tile of activations and one block of outputs. x, start, x_scale, x_sum: what `prepare` wrote for the tile.
struct TileArgs {
    const uint32_t* codes;  // of this block of outputs, in the layout of matmul.h
    const void* scale;      // [groups][32] of scale_dtype
    const uint8_t* zero;    // [groups][32] or null
    const float* table;     // sixteen values, or null for integers
    int scale_dtype;
    const Block* blocks;
    const void* x;
    const int32_t* start;  // [blocks][virtual rows]: what the sums begin with
    const float* x_scale;  // [blocks][rows]
    const float* x_sum;    // [blocks][rows]: sum of the block's inputs
};

struct PrepareArgs {
    const Block* blocks;
    int64_t n_blocks, cols;
    int64_t rows;  // of the tile
    int limbs;     // 0: codebook
    bool symmetric;
    int32_t middle;  // 2**(bits-1)
    void* x;
    int32_t* start;
    float *x_scale, *x_sum;
};

typedef void (*TileFn)(const TileArgs&, int64_t first_block, int64_t last_block, float* total);

struct MatmulKernels {
    // The kernel for tiles of `rows` rows, or null. limbs 0: codebook.
    TileFn (*pick)(int bits, int limbs, int64_t rows);
    void (*prepare)(const PrepareArgs&, const void* x, int x_dtype, int64_t row);
    void (*finish)(const float* total, const void* bias, void* y, int dtype, int64_t n);
    bool pairs;  // codebooks take their inputs as bfloat16
};

// Null where this build or this machine lacks the ISA.
const MatmulKernels* matmul_for(int isa);

const MatmulKernels* scalar_matmul();
#ifdef QKIT_X86
const MatmulKernels* avx2_matmul();
const MatmulKernels* avxvnni_matmul();
const MatmulKernels* avx512_matmul();
const MatmulKernels* avx512vnni_matmul();
const MatmulKernels* avx512bf16_matmul();
#endif

}  // namespace qkit
