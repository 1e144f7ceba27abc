// All row kernels, compiled with the flags of the file that includes this.
#pragma once
#include "gemv.h"
#include "gptq.h"
#include "packing.h"
#include "quantize.h"
#include "rows.h"

namespace {

const qkit::RowKernels TABLE = {quantize, pack, unpack, dequantize, gemv, search, feedback, descend};

}  // namespace
