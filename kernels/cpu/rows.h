// What an ISA file provides: kernels over one row (or one tile), called from the drivers in api.cpp.
#pragma once
#include <cstdint>

#include "matmul_types.h"
#include "qkit_cpu.h"

namespace qkit {

struct QuantizeArgs {
    int w_dtype, scale_dtype;
    int64_t cols, groups;
    int bits, min_zero;
    bool symmetric;
    const float* multipliers;
    int candidates;
};

struct DequantizeArgs {
    int scale_dtype, out_dtype;
    int64_t cols, groups;
    int bits;
};

// One block of at most MAX_COLUMNS columns of GPTQ; all matrices float [columns, out] but `matrix`, [columns, columns]
// of row stride `stride`. See gptq.h.
constexpr int64_t MAX_COLUMNS = 128;
struct ColumnArgs {
    const float *target, *weight, *matrix, *diagonal, *scale, *zero;
    float mid, top;
    float *codes, *errors;
    int64_t columns, out, stride;
};

struct GgmlArgs {
    const QkGrid& grid;
    int block_bytes;
    int w_dtype;
    int64_t cols;
    const float* weight;
    double* stats;  // of all rows: squared errors, squares, and how many scales left float16
};

struct RowKernels {
    // Each returns a QkStatus where it can fail.
    int (*quantize)(const QuantizeArgs&, const void* w, uint8_t* codes, void* scale, uint8_t* zero, double* stats);
    int (*pack)(const uint8_t* codes, uint32_t* packed, int64_t n, int bits);
    void (*unpack)(const uint32_t* packed, uint8_t* codes, int64_t n, int bits);
    void (*dequantize)(const DequantizeArgs&, const uint32_t* packed, const void* scale, const uint8_t* zero, void* out);
    int (*search)(const QuantizeArgs&, const void* w, const float* cost, void* scale, uint8_t* zero);
    void (*feedback)(const ColumnArgs&, int64_t begin, int64_t n);
    void (*descend)(const ColumnArgs&, int64_t begin, int64_t n);
    void (*ggml)(const GgmlArgs&, const void* w, uint8_t* out, int64_t n);
    // The matmul's ends: row `row` of a tile of activations, and y[0 .. n) = total + bias, rounded once; n <= 32.
    void (*prepare)(const PrepareArgs&, const void* x, int x_dtype, int64_t row);
    // Whether two limbs are too few for some block of x [cols]: activations.h.
    bool (*uneven)(const Block* blocks, int64_t n_blocks, const void* x, int x_dtype, int64_t cols);
    void (*finish)(const float* total, const void* bias, void* y, int dtype, int64_t n);
};

// Null where this build or this machine lacks the ISA.
const RowKernels* kernels_for(int isa);

}  // namespace qkit
