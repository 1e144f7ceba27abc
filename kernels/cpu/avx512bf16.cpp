// AVX-512 BF16 on top of avx512vnni.cpp. Only the matmul gains.
#include "levels.h"
#include "matmul.h"

namespace qkit {
Tile avx512bf16_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
