// AVX-512 VNNI on top of avx512.cpp. Only the matmul gains; flags in CMakeLists.txt.
#include "matmul.h"

namespace qkit {
const MatmulKernels* avx512vnni_matmul() { return &MATMUL; }
}  // namespace qkit
