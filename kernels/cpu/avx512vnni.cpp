// AVX-512 VNNI on top of avx512.cpp. Only the matmul gains.
#include "levels.h"
#include "matmul.h"

namespace qkit {
Tile avx512vnni_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
