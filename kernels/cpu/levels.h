// What each ISA file provides. Which of them are in a build is decided in CMakeLists.txt (QKIT_HAS_...).
#pragma once
#include "matmul_types.h"
#include "rows.h"
#include "step_types.h"

namespace qkit {

const RowKernels* scalar_kernels();
const RowKernels* avx2_kernels();
const RowKernels* avx512_kernels();

const StepKernels* scalar_step();
const StepKernels* avx2_step();
const StepKernels* avx512_step();
const StepKernels* avx512bf16_step();

// The kernels that matmul_for hands out.
Tile scalar_tile(int bits, int limbs, int64_t rows);
Tile avx2_tile(int bits, int limbs, int64_t rows);
Tile avxvnni_tile(int bits, int limbs, int64_t rows);
Tile avx512_tile(int bits, int limbs, int64_t rows);
Tile avx512vnni_tile(int bits, int limbs, int64_t rows);
Tile avx512bf16_tile(int bits, int limbs, int64_t rows);
Tile amx_tile(int bits, int limbs, int64_t rows);
Tile dotprod_tile(int bits, int limbs, int64_t rows);
Tile i8mm_tile(int bits, int limbs, int64_t rows);

}  // namespace qkit
