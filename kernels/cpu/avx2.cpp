// AVX2 + FMA + F16C; the flags are set in CMakeLists.txt.
#include "table.h"

namespace qkit {
const RowKernels* avx2_kernels() { return &TABLE; }
const MatmulKernels* avx2_matmul() { return &MATMUL; }
}  // namespace qkit
