// qk_gemv: lays the activations out in planes (see gemv.h), then spreads the weight's rows over threads.
#include <cstdlib>
#include <memory>

#include "lanes.h"
#include "pool.h"
#include "qkit_cpu.h"
#include "rows.h"

using namespace qkit;

namespace {

constexpr int64_t MAX_M = 8;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

float get(const void* x, int64_t i, int dtype) {
    if (dtype == QK_F32) return ((const float*)x)[i];
    const uint16_t h = ((const uint16_t*)x)[i];
    return dtype == QK_BF16 ? as_float((uint32_t)h << 16) : from_f16(h);
}

void put(void* x, int64_t i, int dtype, float value) {
    if (dtype == QK_F32) ((float*)x)[i] = value;
    else ((uint16_t*)x)[i] = dtype == QK_BF16 ? to_bf16(value) : to_f16(value);
}

void lay_out(const void* x, int dtype, float* planes, float* sums, int64_t m, int64_t cols, int64_t blocks, int per) {
    for (int64_t k = 0; k < m; ++k)
        for (int64_t word = 0; word * per < cols; ++word) {
            const int64_t block = k * blocks + word / LANES, lane = word % LANES;
            for (int j = 0; j < per; ++j) {
                const float value = get(x, k * cols + word * per + j, dtype);
                planes[(block * per + j) * LANES + lane] = value;
                sums[block * LANES + lane] += value;
            }
        }
}

}  // namespace

int qk_gemv(const void* x, int x_dtype, const uint32_t* packed, const void* scale, int scale_dtype,
            const uint8_t* zero, const void* bias, void* out, int64_t m, int64_t rows, int64_t cols, int64_t groups,
            int bits, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (!k) return QK_BAD_ISA;
    if (bits != 4 && bits != 8) return QK_BAD_BITS;
    if (m < 1 || m > MAX_M || rows < 1 || cols < 1 || groups < 1 || cols % groups) return QK_BAD_SHAPE;
    const int per = 32 / bits;
    if (cols % per || cols / groups % per) return QK_BAD_SHAPE;
    if (x_dtype < 0 || x_dtype > QK_BF16 || scale_dtype < 0 || scale_dtype > QK_BF16) return QK_BAD_DTYPE;
    if (!x || !packed || !scale || !out) return QK_NULL;

    const int64_t words = cols / per, blocks = (words + LANES - 1) / LANES;
    const int64_t padded = m <= 2 ? m : m <= 4 ? 4 : 8;  // the row kernels exist for 1, 2, 4 and 8 vectors
    const int64_t planes = padded * blocks * per * LANES, floats = planes + padded * blocks * LANES;
    // Aligned to a cache line: a load of sixteen floats that straddles two costs twice.
    const size_t bytes = ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    const std::unique_ptr<float, Free> scratch((float*)std::aligned_alloc(64, bytes));
    if (!scratch) return QK_NO_MEMORY;
    std::memset(scratch.get(), 0, bytes);
    lay_out(x, x_dtype, scratch.get(), scratch.get() + planes, m, cols, blocks, per);

    const GemvArgs args{scratch.get(), scratch.get() + planes, scale_dtype, padded, cols, groups, bits};
    const int64_t scale_step = groups * (scale_dtype == QK_F32 ? 4 : 2);
    auto body = [&](int64_t begin, int64_t end) {
        float y[MAX_M];
        for (int64_t r = begin; r < end; ++r) {
            k->gemv(args, packed + r * words, (const char*)scale + r * scale_step, zero ? zero + r * groups : nullptr, y);
            for (int64_t i = 0; i < m; ++i)
                put(out, i * rows + r, x_dtype, y[i] + (bias ? get(bias, r, x_dtype) : 0.0f));
        }
    };
    // About 256K weights a piece: some 10 microseconds, well above what waking a thread costs.
    const int64_t piece = 262144 / cols;
    over(rows, piece > 1 ? piece : 1, nthreads, body);
    return QK_OK;
}
