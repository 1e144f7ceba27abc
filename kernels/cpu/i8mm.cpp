// NEON with dot products of unsigned by signed bytes (Armv8.6 i8mm). Only the matmul gains.
#include "levels.h"
#include "matmul.h"

namespace qkit {
Tile i8mm_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
