// AVX-VNNI on top of avx2.cpp: byte dot products of 256 bits. Only the matmul gains.
#include "levels.h"
#include "matmul.h"

namespace qkit {
Tile avxvnni_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
