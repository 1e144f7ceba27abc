// The C ABI of GPTQ's inner loops: checks, then spreads rows or channels over threads.
#include <atomic>

#include "pool.h"
#include "qkit_cpu.h"
#include "rows.h"
#include "sizes.h"

using namespace qkit;

namespace {

int over_channels(const ColumnArgs& args, void (*kernel)(const ColumnArgs&, int64_t, int64_t), int nthreads) {
    constexpr int64_t LANES = 16;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice) {
            const int64_t first = slice * LANES, left = args.out - first;
            kernel(args, first, left < LANES ? left : LANES);
        }
    };
    parallel_for((args.out + LANES - 1) / LANES, 4, nthreads, body);
    return QK_OK;
}

int check_columns(const ColumnArgs& a, const RowKernels* k) {
    if (!k) return QK_BAD_ISA;
    if (a.columns < 0 || a.columns > MAX_COLUMNS || a.out < 0 || a.stride < a.columns) return QK_BAD_SHAPE;
    if (too_large(MAX_COLUMNS, a.out) || too_large(MAX_COLUMNS, a.stride)) return QK_BAD_SHAPE;
    if (a.columns == 0 || a.out == 0) return QK_OK;
    return a.target && a.matrix && a.scale && a.codes && a.errors ? QK_OK : QK_NULL;
}

}  // namespace

int qk_gptq_search(const void* w, int w_dtype, const float* cost, void* scale, int scale_dtype, uint8_t* zero,
                   int64_t rows, int64_t cols, int64_t groups, int bits, int min_zero, const float* multipliers,
                   int n_multipliers, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (!k) return QK_BAD_ISA;
    if (bits != 4 && bits != 8) return QK_BAD_BITS;
    if (!is_dtype(w_dtype) || !is_dtype(scale_dtype)) return QK_BAD_DTYPE;
    if (rows < 0 || cols < 1 || too_large(rows, cols) || groups < 1 || cols % groups) return QK_BAD_SHAPE;
    if (min_zero < 0 || min_zero > 1 || n_multipliers < 1) return QK_BAD_SHAPE;
    if (rows && (!w || !cost || !scale || !multipliers)) return QK_NULL;
    const QuantizeArgs args{w_dtype,  scale_dtype,     cols,        groups,       bits,
                            min_zero, zero == nullptr, multipliers, n_multipliers};
    const int64_t w_step = cols * itemsize(w_dtype), scale_step = groups * itemsize(scale_dtype);
    std::atomic<int> status{QK_OK};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int code = k->search(args, (const char*)w + r * w_step, cost, (char*)scale + r * scale_step,
                                       zero ? zero + r * groups : nullptr);
            int expected = QK_OK;
            if (code != QK_OK) status.compare_exchange_strong(expected, code);
        }
    };
    parallel_for(rows, 4, nthreads, body);
    return status;
}

int qk_gptq_feedback(const float* target, const float* weight, const float* l, int64_t stride, const float* scale,
                     const float* zero, float mid, float top, float* codes, float* errors, int64_t columns, int64_t out,
                     int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    const ColumnArgs args{target, weight, l, nullptr, scale, zero, mid, top, codes, errors, columns, out, stride};
    if (const int bad = check_columns(args, k)) return bad;
    if (!weight && columns && out) return QK_NULL;
    return over_channels(args, k->feedback, nthreads);
}

int qk_gptq_descend(const float* gradient, const float* h, int64_t stride, const float* diagonal, const float* scale,
                    float top, float* codes, float* steps, int64_t columns, int64_t out, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    const ColumnArgs args{gradient, nullptr, h, diagonal, scale, nullptr, 0.0f, top, codes, steps, columns, out, stride};
    if (const int bad = check_columns(args, k)) return bad;
    if (!diagonal && columns && out) return QK_NULL;
    return over_channels(args, k->descend, nthreads);
}
