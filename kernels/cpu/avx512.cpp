// AVX-512 F, BW, DQ, VL (and what avx2.cpp needs); the flags are set in CMakeLists.txt.
#include "table.h"

namespace qkit {
const RowKernels* avx512_kernels() { return &TABLE; }
const MatmulKernels* avx512_matmul() { return &MATMUL; }
}  // namespace qkit
