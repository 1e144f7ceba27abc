// AVX2 + FMA + F16C; the flags are set in CMakeLists.txt.
#include "table.h"

namespace qkit {
const RowKernels* avx2_kernels() { return &TABLE; }
}  // namespace qkit
