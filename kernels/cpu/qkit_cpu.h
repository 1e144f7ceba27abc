// The C ABI of the CPU kernels. Plain C types and integer return codes only: the library is loaded with ctypes
// and is tied to no Python and no torch version. Every pointer is to contiguous row-major memory.
//
// "packed" is int32 [rows, ceil(n * bits / 32)], unsigned codes, low bits first, zero padded.
#pragma once
#include <cstdint>

#define QK_API extern "C" __attribute__((visibility("default")))

enum QkStatus {
    QK_OK = 0,
    QK_BAD_BITS = 1,         // bits is neither 4 nor 8
    QK_BAD_SHAPE = 2,        // a size is negative, does not divide as the function needs, or a product is over 2**48
    QK_NULL = 3,             // a required pointer is null
    QK_BAD_DTYPE = 4,        // not one of QkDtype
    QK_BAD_ISA = 5,          // unknown, or this machine lacks it
    QK_NON_FINITE = 6,       // a weight is NaN or infinite
    QK_SCALE_OVERFLOW = 7,   // a scale does not fit its stored type
    QK_CODE_RANGE = 8,       // a code is above 2**bits - 1
    QK_NO_MEMORY = 9,
};

enum QkDtype { QK_F32 = 0, QK_F16 = 1, QK_BF16 = 2 };
// Ordered: of those that a machine has, a later one is at least as fast.
enum QkIsa {
    QK_SCALAR = 0,      // the platform's baseline: SSE2 on x86-64, NEON on aarch64
    QK_AVX2 = 1,
    QK_AVXVNNI = 2,     // 256-bit dot products of bytes
    QK_AVX512 = 3,      // F, BW, DQ, VL
    QK_AVX512VNNI = 4,
    QK_AVX512BF16 = 5,  // with VNNI
    QK_AMX = 6,         // with AVX512BF16: tile products of bytes
    QK_DOTPROD = 7,     // NEON dot products of bytes (Armv8.2)
    QK_I8MM = 8,        // with DOTPROD: unsigned by signed bytes (Armv8.6)
    QK_ISA_COUNT = 9,
};

// Version of this interface: raised whenever a signature or a meaning below changes.
QK_API int qk_abi(void);

// Runs every later call on the threads of the OpenMP runtime `library` (a file name), if this process has loaded it: 1, else
// 0 and nothing changes.
QK_API int qk_use_openmp(const char* library);

// 1 where this build and this machine both have `isa`.
QK_API int qk_has_isa(int isa);

// zlib's CRC-32 of n bytes. QK_BAD_ISA where the processor has no carry-less products, without which zlib is as fast.
QK_API int qk_crc32(const uint8_t* data, int64_t n, uint32_t* crc);

// codes uint8 [rows, n] <-> packed.
QK_API int qk_pack(const uint8_t* codes, uint32_t* packed, int64_t rows, int64_t n, int bits, int isa, int nthreads);
QK_API int qk_unpack(const uint32_t* packed, uint8_t* codes, int64_t rows, int64_t n, int bits, int isa, int nthreads);

// codes uint8 [rows, n] <-> the transpose of packed, int32 [n * bits / 32, rows]; n * bits % 32 == 0.
QK_API int qk_pack_transposed(const uint8_t* codes, uint32_t* packed, int64_t rows, int64_t n, int bits, int isa,
                              int nthreads);
QK_API int qk_unpack_transposed(const uint32_t* packed, uint8_t* codes, int64_t rows, int64_t n, int bits, int isa,
                                int nthreads);

// out[r, c] = (code - zero) * scale in float32, rounded once (ties to even) to out_dtype.
// scale [rows, groups] of scale_dtype; zero uint8 [rows, groups] or null for 2**(bits-1).
QK_API int qk_dequantize(const uint32_t* packed, const void* scale, int scale_dtype, const uint8_t* zero, void* out,
                         int out_dtype, int64_t rows, int64_t cols, int64_t groups, int bits, int isa, int nthreads);

// Round to nearest on a per-group grid (see quantize.h for the grid). w [rows, cols] of w_dtype; writes codes
// uint8 [rows, cols], scale [rows, groups] of scale_dtype, zero uint8 [rows, groups] (null: symmetric), and
// totals = {sum of squared errors, sum of squares}. row_stats: scratch, double [rows, 2]; the totals are summed
// from it in row order, so that they do not depend on nthreads or isa. Clip search: with n_multipliers > 0 each group
// takes the one of the spanning scale and its multiples that leaves the least squared error, the first on a tie.
QK_API int qk_quantize_rtn(const void* w, int w_dtype, uint8_t* codes, void* scale, int scale_dtype, uint8_t* zero,
                           double* row_stats, double* totals, int64_t rows, int64_t cols, int64_t groups, int bits,
                           int min_zero, const float* multipliers, int n_multipliers, int isa, int nthreads);

// A weight [rows, cols] as qk_matmul takes it. scale and zero lie in blocks of 32 rows, [ceil(rows / 32)][groups][32],
// rows beyond the last zero. zero null: 2**(bits-1). table: what the sixteen 4-bit codes stand for (then no zero), or
// null for integers. One group, or groups of a multiple of eight.
struct QkWeight {
    const uint32_t* codes;
    const void* scale;
    const uint8_t* zero;
    const float* table;
    int64_t rows, cols, groups;
    int bits, scale_dtype;
};

// packed <-> the layout of matmul.h, qk_prepacked_bytes(...) long (-1: bad sizes).
QK_API int64_t qk_prepacked_bytes(int64_t rows, int64_t cols, int bits);
QK_API int qk_prepack(const uint32_t* packed, uint32_t* codes, int64_t rows, int64_t cols, int bits, int nthreads);
QK_API int qk_restore(const uint32_t* codes, uint32_t* packed, int64_t rows, int64_t cols, int bits, int nthreads);

// out [m, rows] = x [m, cols] @ weight.T (+ bias [rows]); x, bias and out of x_dtype. Weights are not rounded to x_dtype.
// int8 0: x in fixed point of 16 bits (24 for float32) per row and block of at most 128 inputs, or, with AVX-512 BF16, 48
// bfloat16 rows and more as they are; 1: each row of x is rounded to int8 first, scale max|x| / 127. A row with a NaN or an
// infinity gives NaN; as it is, what arithmetic on floats gives.
QK_API int qk_matmul(const QkWeight* weight, const void* x, int x_dtype, const void* bias, void* out, int64_t m,
                     int int8, int isa, int nthreads);

// The scale of each group, out of multiples of the one that spans it, that leaves the least
// sum_j cost[j] * (w[j] - nearest grid value)^2. w [rows, cols] of w_dtype, cost float [cols] (not negative); writes
// scale [rows, groups] of scale_dtype and zero uint8 [rows, groups] (null: symmetric).
QK_API int qk_gptq_search(const void* w, int w_dtype, const float* cost, void* scale, int scale_dtype, uint8_t* zero,
                          int64_t rows, int64_t cols, int64_t groups, int bits, int min_zero, const float* multipliers,
                          int n_multipliers, int isa, int nthreads);

// One block of columns (at most 128) of the GPTQ loop. Float [columns, out]: target (what each column should be, errors
// of earlier blocks included), weight, scale, zero (null: mid); writes codes 0 .. top and errors = weight - value.
// The last column comes first; after column j, target[i] += l[j * stride + i] * errors[j] for the columns i before it.
QK_API int qk_gptq_feedback(const float* target, const float* weight, const float* l, int64_t stride,
                            const float* scale, const float* zero, float mid, float top, float* codes, float* errors,
                            int64_t columns, int64_t out, int isa, int nthreads);

// One block of columns of cyclic coordinate descent on the codes, the last column first. Float [columns, out]: gradient, scale, codes (updated);
// h [columns, columns] of row stride `stride`, symmetric; diagonal [columns]; writes steps = value change.
QK_API int qk_gptq_descend(const float* gradient, const float* h, int64_t stride, const float* diagonal,
                           const float* scale, float top, float* codes, float* steps, int64_t columns, int64_t out,
                           int isa, int nthreads);

// A block type of ggml (kernels/ggml/grids.py): levels low .. high, or those of `levels`, ascending; sub-blocks of `sub` inputs.
// Scales: integers least .. most times a float16 of each 256 inputs, or, with most 0, a float16 each, or, with `power`, a byte
// each, a power of two. affine: a minimum beside each scale. targets: what the largest weight is tried at; none: at `high`.
// pieces: what a block holds, in order. stored: of `levels`, the code of each; null: its position.
enum QkPart { QK_D = 0, QK_DMIN = 1, QK_CODES = 2, QK_SCALES = 3, QK_SCALE_MIN = 4 };
struct QkPiece {
    int32_t part, add, shift, bits, run;  // kernels/ggml/layout.py
};
struct QkGrid {
    int32_t sub, low, high, affine, power, least, most, n_levels, n_targets, n_pieces;
    const float *levels, *targets;
    const uint8_t* stored;
    const QkPiece* pieces;
};

// w [rows, cols] -> out uint8 [rows, bytes of a row's blocks]. weight [cols] or null: what an error in each column costs.
// stats: scratch, 3 * ceil(rows / 16); totals[2]: the sum of squared errors, unweighed, and the sum of squares, which is NaN
// where a weight is. Where a scale does not fit float16, everything is written all the same.
QK_API int qk_ggml_encode(const void* w, int w_dtype, const float* weight, const QkGrid* grid, uint8_t* out, double* stats,
                          double* totals, int64_t rows, int64_t cols, int isa, int nthreads);
