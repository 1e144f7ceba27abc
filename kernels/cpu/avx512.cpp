// AVX-512 F, BW, DQ, VL (and what avx2.cpp needs).
#include "levels.h"
#include "matmul.h"
#include "row_kernels.h"

namespace qkit {
const RowKernels* avx512_kernels() { return &ROW_KERNELS; }
const StepKernels* avx512_step() { return &STEP; }
Tile avx512_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
