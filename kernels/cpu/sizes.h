// Arithmetic on sizes that the checks and drivers of the C ABI share. Not for the files of an ISA (see lanes.h).
#pragma once
#include <algorithm>
#include <cstdint>

#include "qkit_cpu.h"

namespace qkit {

inline bool is_dtype(int d) { return d == QK_F32 || d == QK_F16 || d == QK_BF16; }
inline int64_t itemsize(int dtype) { return dtype == QK_F32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes whose product leaves no room for the arithmetic on it.
inline bool too_large(int64_t a, int64_t b) { return a > 0 && b > (int64_t{1} << 48) / a; }

}  // namespace qkit
