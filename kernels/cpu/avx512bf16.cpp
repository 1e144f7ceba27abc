// AVX-512 BF16 on top of avx512vnni.cpp. Only products gain.
#include "levels.h"
#include "matmul.h"
#include "prompt.h"

namespace qkit {
const StepKernels* avx512bf16_step() { return &STEP; }
Tile avx512bf16_tile(int bits, int limbs, int64_t rows) { return pick(bits, limbs, rows); }
}  // namespace qkit
