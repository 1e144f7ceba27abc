// The platform's baseline (SSE2 on x86-64, NEON on aarch64).
#include "levels.h"
#include "matmul.h"
#include "row_kernels.h"

namespace qkit {
const RowKernels* scalar_kernels() { return &ROW_KERNELS; }
const StepKernels* scalar_step() { return &STEP; }
Tile scalar_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
