// The C ABI: checks every argument, picks the ISA's row kernels, and spreads rows over threads.
#include "qkit_cpu.h"

#include <atomic>
#include <cstring>

#include "pool.h"
#include "rows.h"
#include "sizes.h"

using namespace qkit;

namespace {

int64_t words_for(int64_t n, int bits) { return ceil_div(n * bits, 32); }

// Rows a thread takes at a time: enough work (about 64K values) that handing out a piece costs nothing beside it.
int64_t rows_per_piece(int64_t cols) {
    const int64_t rows = 65536 / (cols > 0 ? cols : 1);
    return rows > 1 ? rows : 1;
}

// Keeps the first failure. Which of two different failures wins may depend on timing; that one is reported does not.
void note(std::atomic<int>& status, int code) {
    int expected = QK_OK;
    if (code != QK_OK) status.compare_exchange_strong(expected, code);
}

int check_packing(const void* a, const void* b, int64_t rows, int64_t n, int bits, const RowKernels* k) {
    if (!k) return QK_BAD_ISA;
    if (bits != 4 && bits != 8) return QK_BAD_BITS;
    if (rows < 0 || n < 0 || too_large(rows, n)) return QK_BAD_SHAPE;
    return (a && b) || rows == 0 || n == 0 ? QK_OK : QK_NULL;
}

// Transposing works on square tiles of words, 16 KiB: it stays in the first-level cache, and every run of words
// that is written or read is 256 bytes long.
constexpr int64_t TILE = 64;

void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t cols) {
    for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

int qk_abi(void) { return 9; }

int qk_use_openmp(const char* library) { return library && use_openmp(library); }

int qk_pack(const uint8_t* codes, uint32_t* packed, int64_t rows, int64_t n, int bits, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(codes, packed, rows, n, bits, k)) return bad;
    const int64_t words = words_for(n, bits);
    std::atomic<int> status{QK_OK};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) note(status, k->pack(codes + r * n, packed + r * words, n, bits));
    };
    parallel_for(rows, rows_per_piece(n), nthreads, body);
    return status;
}

int qk_unpack(const uint32_t* packed, uint8_t* codes, int64_t rows, int64_t n, int bits, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(codes, packed, rows, n, bits, k)) return bad;
    const int64_t words = words_for(n, bits);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) k->unpack(packed + r * words, codes + r * n, n, bits);
    };
    parallel_for(rows, rows_per_piece(n), nthreads, body);
    return QK_OK;
}

int qk_pack_transposed(const uint8_t* codes, uint32_t* packed, int64_t rows, int64_t n, int bits, int isa,
                       int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(codes, packed, rows, n, bits, k)) return bad;
    if (n * bits % 32) return QK_BAD_SHAPE;
    const int64_t words = n * bits / 32, per_word = 32 / bits;
    std::atomic<int> status{QK_OK};
    auto body = [&](int64_t begin, int64_t end) {
        uint32_t tile[TILE * TILE];
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t r0 = strip * TILE, height = std::min<int64_t>(TILE, rows - r0);
            for (int64_t c0 = 0; c0 < words; c0 += TILE) {
                const int64_t width = std::min<int64_t>(TILE, words - c0);
                for (int64_t r = 0; r < height; ++r)
                    note(status, k->pack(codes + (r0 + r) * n + c0 * per_word, tile + r * TILE, width * per_word, bits));
                transpose(tile, TILE, packed + c0 * rows + r0, rows, height, width);
            }
        }
    };
    parallel_for((rows + TILE - 1) / TILE, 1, nthreads, body);
    return status;
}

int qk_unpack_transposed(const uint32_t* packed, uint8_t* codes, int64_t rows, int64_t n, int bits, int isa,
                         int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(codes, packed, rows, n, bits, k)) return bad;
    if (n * bits % 32) return QK_BAD_SHAPE;
    const int64_t words = n * bits / 32, per_word = 32 / bits;
    auto body = [&](int64_t begin, int64_t end) {
        uint32_t tile[TILE * TILE];
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t r0 = strip * TILE, height = std::min<int64_t>(TILE, rows - r0);
            for (int64_t c0 = 0; c0 < words; c0 += TILE) {
                const int64_t width = std::min<int64_t>(TILE, words - c0);
                transpose(packed + c0 * rows + r0, rows, tile, TILE, width, height);
                for (int64_t r = 0; r < height; ++r)
                    k->unpack(tile + r * TILE, codes + (r0 + r) * n + c0 * per_word, width * per_word, bits);
            }
        }
    };
    parallel_for((rows + TILE - 1) / TILE, 1, nthreads, body);
    return QK_OK;
}

int qk_dequantize(const uint32_t* packed, const void* scale, int scale_dtype, const uint8_t* zero, void* out,
                  int out_dtype, int64_t rows, int64_t cols, int64_t groups, int bits, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(packed, out, rows, cols, bits, k)) return bad;
    if (!is_dtype(scale_dtype) || !is_dtype(out_dtype)) return QK_BAD_DTYPE;
    if (groups < 1 || cols % groups || (groups > 1 && cols / groups % 2)) return QK_BAD_SHAPE;
    if (!scale && rows) return QK_NULL;
    const DequantizeArgs args{scale_dtype, out_dtype, cols, groups, bits};
    const int64_t words = words_for(cols, bits), scale_step = groups * itemsize(scale_dtype);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            k->dequantize(args, packed + r * words, (const char*)scale + r * scale_step,
                          zero ? zero + r * groups : nullptr, (char*)out + r * cols * itemsize(out_dtype));
    };
    parallel_for(rows, rows_per_piece(cols), nthreads, body);
    return QK_OK;
}

int qk_quantize_rtn(const void* w, int w_dtype, uint8_t* codes, void* scale, int scale_dtype, uint8_t* zero,
                    double* row_stats, double* totals, int64_t rows, int64_t cols, int64_t groups, int bits,
                    int min_zero, const float* multipliers, int n_multipliers, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (const int bad = check_packing(w, codes, rows, cols, bits, k)) return bad;
    if (!is_dtype(w_dtype) || !is_dtype(scale_dtype)) return QK_BAD_DTYPE;
    if (groups < 1 || cols % groups || min_zero < 0 || min_zero > 1) return QK_BAD_SHAPE;
    if (n_multipliers < 0) return QK_BAD_SHAPE;
    if (!totals || (n_multipliers && !multipliers) || (rows && (!scale || !row_stats))) return QK_NULL;
    const QuantizeArgs args{w_dtype,  scale_dtype,     cols,        groups,       bits,
                            min_zero, zero == nullptr, multipliers, n_multipliers};
    const int64_t w_step = cols * itemsize(w_dtype), scale_step = groups * itemsize(scale_dtype);
    std::atomic<int> status{QK_OK};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end && status.load(std::memory_order_relaxed) == QK_OK; ++r)
            note(status, k->quantize(args, (const char*)w + r * w_step, codes + r * cols, (char*)scale + r * scale_step,
                                     zero ? zero + r * groups : nullptr, row_stats + 2 * r));
    };
    parallel_for(rows, rows_per_piece(cols), nthreads, body);
    if (status != QK_OK) return status;
    totals[0] = totals[1] = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
        totals[0] += row_stats[2 * r];
        totals[1] += row_stats[2 * r + 1];
    }
    return QK_OK;
}
