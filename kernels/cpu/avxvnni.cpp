// AVX-VNNI on top of avx2.cpp: byte dot products of 256 bits. Only the matmul gains; flags in CMakeLists.txt.
#include "matmul.h"

namespace qkit {
const MatmulKernels* avxvnni_matmul() { return &MATMUL; }
}  // namespace qkit
