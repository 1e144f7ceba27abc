// NEON with the dot products of Armv8.2 on top of scalar.cpp. Only the matmul gains.
#include "levels.h"
#include "matmul.h"

namespace qkit {
Tile dotprod_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
