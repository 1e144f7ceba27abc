// qk_prepack, qk_restore, qk_matmul: checks, and spreads the parts of a product over threads.
#include <atomic>
#include <new>

#include "pool.h"
#include "product.h"
#include "sizes.h"

using namespace qkit;

namespace {

constexpr int64_t SLAB = 32 << 20;  // bytes of laid out activations at a time, unless a single chunk takes more

int64_t eights(int64_t cols) { return ceil_div(cols, 8); }

// The four nibbles of h, one to a byte.
uint32_t spread(uint32_t h) {
    h = (h | h << 8) & 0x00ff00ffu;
    return (h | h << 4) & 0x0f0f0f0fu;
}
uint32_t gather(uint32_t bytes) {
    bytes = (bytes | bytes >> 4) & 0x00ff00ffu;
    return (bytes | bytes >> 8) & 0xffffu;
}
uint32_t shuffle(uint32_t word) { return spread(word & 0xffffu) | spread(word >> 16) << 4; }
uint32_t unshuffle(uint32_t word) { return gather(word & 0x0f0f0f0fu) | gather(word >> 4 & 0x0f0f0f0fu) << 16; }

int check(int64_t rows, int64_t cols, int bits) {
    if (bits != 4 && bits != 8) return QK_BAD_BITS;
    return rows < 1 || cols < 1 || too_large(rows, cols) ? QK_BAD_SHAPE : QK_OK;
}

}  // namespace

int64_t qk_prepacked_bytes(int64_t rows, int64_t cols, int bits) {
    return check(rows, cols, bits) ? -1 : ceil_div(rows, WIDE) * WIDE * eights(cols) * bits;
}

int qk_prepack(const uint32_t* packed, uint32_t* codes, int64_t rows, int64_t cols, int bits, int nthreads) {
    if (const int bad = check(rows, cols, bits)) return bad;
    if (!packed || !codes) return QK_NULL;
    const int64_t words = ceil_div(cols * bits, 32), padded = eights(cols) * bits / 4;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            uint32_t* to = codes + b * padded * WIDE;
            const int64_t here = std::min<int64_t>(WIDE, rows - b * WIDE);
            for (int64_t j = 0; j < padded; ++j)
                for (int64_t r = 0; r < WIDE; ++r) {
                    const uint32_t word = r < here && j < words ? packed[(b * WIDE + r) * words + j] : 0;
                    to[j * WIDE + r] = bits == 4 ? shuffle(word) : word;
                }
        }
    };
    parallel_for(ceil_div(rows, WIDE), 1, nthreads, body);
    return QK_OK;
}

int qk_restore(const uint32_t* codes, uint32_t* packed, int64_t rows, int64_t cols, int bits, int nthreads) {
    if (const int bad = check(rows, cols, bits)) return bad;
    if (!packed || !codes) return QK_NULL;
    const int64_t words = ceil_div(cols * bits, 32), padded = eights(cols) * bits / 4;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t j = 0; j < words; ++j) {
                const uint32_t word = codes[(r / WIDE * padded + j) * WIDE + r % WIDE];
                packed[r * words + j] = bits == 4 ? unshuffle(word) : word;
            }
    };
    parallel_for(rows, WIDE, nthreads, body);
    return QK_OK;
}

namespace {

int multiply(const QkWeight& w, const char* x, int x_dtype, const char* bias, char* out, int64_t m, int int8, int isa,
             int nthreads) {
    Product p;
    if (const int bad = p.plan(w, m, x_dtype, limbs_of(w, x_dtype, int8, false, m, isa), isa)) return bad;
    if (p.limbs == 2) {
        std::atomic<bool> uneven{false};
        auto look = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end && !uneven.load(std::memory_order_relaxed); ++r)
                if (p.uneven(x, r)) uneven.store(true);
        };
        parallel_for(m, ceil_div(32768, w.cols), nthreads, look);
        if (uneven.load())
            if (const int bad = p.plan(w, m, x_dtype, limbs_of(w, x_dtype, int8, true, m, isa), isa)) return bad;
    }
    const int64_t row = w.cols * itemsize(x_dtype);
    const int64_t tile_bytes = p.tile_bytes();
    const int64_t slab = std::min<int64_t>(p.tiles, std::max<int64_t>(SLAB / (p.chunk * tile_bytes), 1) * p.chunk);  // tiles, whole chunks
    static thread_local Scratch scratch;
    char* base = scratch.get((size_t)(tile_bytes * slab));
    if (!base) return QK_NO_MEMORY;
    for (int64_t done = 0; done < p.tiles; done += slab) {
        const int64_t tiles = std::min<int64_t>(slab, p.tiles - done), here = std::min<int64_t>(m - done * p.rows, tiles * p.rows);
        const char* from = x + done * p.rows * row;
        char* to = out + done * p.rows * w.rows * itemsize(x_dtype);
        p.clear(base, tiles, here);
        auto lay_out = [&](int64_t begin, int64_t end) { p.lay_out(w, base, from, begin, end); };
        // Rows that are interleaved, byte by byte, are one thread's.
        const int64_t unit = p.interleaved();
        parallel_for(here, ceil_div(32768, p.inputs * unit) * unit, nthreads, lay_out);
        auto products = [&](int64_t begin, int64_t end) { p.multiply(w, base, tiles, here, bias, to, begin, end); };
        // Pieces of some ten microseconds, or four a thread where there is less to do, so that a thread that was held up
        // leaves little; not below three microseconds, beside which handing one out is nothing.
        const int64_t work = p.inputs / 8 * w.bits / 4 * WIDE * p.width * std::min<int64_t>(p.chunk, tiles);  // words times virtual rows
        const int64_t items = p.items(w, tiles), even = items / (4 * nthreads);
        parallel_for(items, std::min<int64_t>(ceil_div(49152, work), std::max<int64_t>(ceil_div(12288, work), even)), nthreads, products);
    }
    scratch.trim(SLAB);
    return QK_OK;
}

}  // namespace

int qk_matmul(const QkWeight* weight, const void* x, int x_dtype, const void* bias, void* out, int64_t m, int int8,
              int isa, int nthreads) {
    if (!weight) return QK_NULL;
    const QkWeight& w = *weight;
    if (const int bad = check(w.rows, w.cols, w.bits)) return bad;
    if (m < 0 || w.groups < 1 || w.cols % w.groups || (w.groups > 1 && w.cols / w.groups % 8)) return QK_BAD_SHAPE;
    if (too_large(m, w.rows) || too_large(m, w.cols)) return QK_BAD_SHAPE;
    if (!is_dtype(x_dtype) || !is_dtype(w.scale_dtype)) return QK_BAD_DTYPE;
    if (w.table && (w.bits != 4 || w.zero || int8)) return QK_BAD_BITS;
    if (m == 0) return QK_OK;
    if (!w.codes || !w.scale || !x || !out) return QK_NULL;
    try {
        return multiply(w, (const char*)x, x_dtype, (const char*)bias, (char*)out, m, int8, isa, nthreads);
    } catch (const std::bad_alloc&) {
        return QK_NO_MEMORY;
    }
}
