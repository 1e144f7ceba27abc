// All row kernels, compiled with the flags of the file that includes this.
#pragma once
#include "activations.h"
#include "ggml.h"
#include "gptq.h"
#include "packing.h"
#include "quantize.h"
#include "rows.h"
#include "prompt.h"

namespace {

const qkit::RowKernels ROW_KERNELS = {quantize, pack,    unpack, dequantize, search, feedback,
                                       descend,  ggml,    prepare, uneven,    finish};

}  // namespace
