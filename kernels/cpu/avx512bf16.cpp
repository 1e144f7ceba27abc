// AVX-512 BF16 on top of avx512vnni.cpp. Only the matmul gains; flags in CMakeLists.txt.
#include "matmul.h"

namespace qkit {
const MatmulKernels* avx512bf16_matmul() { return &MATMUL; }
}  // namespace qkit
