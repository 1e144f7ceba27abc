// AVX2 + FMA + F16C; the flags of all these files are set in CMakeLists.txt.
#include "levels.h"
#include "matmul.h"
#include "row_kernels.h"

namespace qkit {
const RowKernels* avx2_kernels() { return &ROW_KERNELS; }
const StepKernels* avx2_step() { return &STEP; }
Tile avx2_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
