// The platform's baseline (SSE2 on x86-64, NEON on aarch64).
#include "table.h"

namespace qkit {
const RowKernels* scalar_kernels() { return &TABLE; }
const MatmulKernels* scalar_matmul() { return &MATMUL; }
}  // namespace qkit
