// qk_prepack, qk_restore, qk_matmul: checks, lays activations out, and spreads blocks of outputs over threads.
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "matmul_types.h"
#include "pool.h"
#include "qkit_cpu.h"
#include "rows.h"
#include "sizes.h"

using namespace qkit;

namespace {

constexpr int64_t BLOCK = BLOCK_INPUTS / 8;  // in eights of inputs
constexpr int64_t CHUNK = 48;  // rows of activations a pass over the weights serves: they stay in the second-level cache
constexpr int64_t SLAB = 32 << 20;  // bytes of laid out activations at a time, unless a single chunk takes more
constexpr int64_t PANEL = 4;   // blocks of inputs a tile takes at a time: 8 KiB of 4-bit codes, in the first-level cache

int64_t eights(int64_t cols) { return up(cols, 8); }

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

// A scratch buffer of this thread, aligned to a page, kept for the next call unless it is large. Null when memory is
// short.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    char* get(size_t bytes) {
        bytes = (bytes + 4095) / 4096 * 4096;
        if (bytes > size) {
            std::free(data);
            data = (char*)std::aligned_alloc(4096, bytes);
            size = data ? bytes : 0;
        }
        return data;
    }
    void trim(size_t most) {
        if (size <= most) return;
        std::free(data);
        data = nullptr;
        size = 0;
    }
};

// How a call is cut into tiles, and what one of them takes of the scratch.
struct Plan {
    Tile tile;
    int limbs;
    int64_t rows, tiles, width;              // of a tile, their number, virtual rows of a tile
    int64_t row_bytes;                       // Layout::ROWS
    int64_t x_bytes, start_items, row_items;  // of one tile
    int64_t bytes() const { return x_bytes + 4 * (start_items + 2 * row_items); }
};

std::vector<Block> blocks_of(const QkWeight& w) {
    std::vector<Block> blocks;
    const int64_t group = w.groups == 1 ? eights(w.cols) : w.cols / w.groups / 8;
    for (int64_t g = 0; g < w.groups; ++g)
        for (int64_t at = 0; at < group; at += BLOCK) blocks.push_back({g, g * group + at, least(BLOCK, group - at)});
    return blocks;
}

// The size of tile that takes least time: products for its rows (those that pad the last tile included), and for each tile
// once more what unpacks the codes, about as much as three quarters of a row. A tile product does the work of eight.
bool choose(Plan& p, PickFn pick, int bits, int64_t m) {
    static const int64_t SIZES[] = {1, 2, 3, 4, 6, 8, 12, 16, 32, 48};
    int64_t cheapest = 0;
    for (const int64_t size : SIZES) {
        const Tile tile = pick(bits, p.limbs, size);
        if (!tile.run) continue;
        const int64_t row = p.limbs > 1 ? 8 * p.limbs : 8;
        const int64_t cost = up(m, size) * (size * (tile.layout == Layout::ROWS ? row / 8 : row) + 6);
        if (cheapest && cost >= cheapest) continue;
        cheapest = cost;
        p.tile = tile;
        p.rows = size;
        p.tiles = up(m, size);
    }
    return cheapest != 0;
}

void measure(Plan& p, const std::vector<Block>& blocks, int64_t inputs) {
    const int64_t n_blocks = (int64_t)blocks.size();
    int64_t longest = 0;
    for (const Block& b : blocks) longest = b.steps > longest ? b.steps : longest;
    p.width = p.rows * (p.limbs ? p.limbs : 1);
    p.row_bytes = up(longest * 8, 64) * 64;
    switch (p.tile.layout) {
        case Layout::QUADS: p.x_bytes = inputs * p.width; break;
        case Layout::ROWS: p.x_bytes = n_blocks * p.row_bytes * p.width; break;
        case Layout::FLOATS: p.x_bytes = inputs * p.width * 4; break;
        case Layout::PAIRS: p.x_bytes = inputs * p.width * 2; break;
    }
    p.x_bytes = up(p.x_bytes, 64) * 64;
    p.start_items = up(n_blocks * p.width, 16) * 16;
    p.row_items = up(n_blocks * p.rows, 16) * 16;
}

}  // namespace

int64_t qk_prepacked_bytes(int64_t rows, int64_t cols, int bits) {
    return check(rows, cols, bits) ? -1 : up(rows, WIDE) * WIDE * eights(cols) * bits;
}

int qk_prepack(const uint32_t* packed, uint32_t* codes, int64_t rows, int64_t cols, int bits, int nthreads) {
    if (const int bad = check(rows, cols, bits)) return bad;
    if (!packed || !codes) return QK_NULL;
    const int64_t words = up(cols * bits, 32), padded = eights(cols) * bits / 4;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            uint32_t* to = codes + b * padded * WIDE;
            const int64_t here = least(WIDE, rows - b * WIDE);
            for (int64_t j = 0; j < padded; ++j)
                for (int64_t r = 0; r < WIDE; ++r) {
                    const uint32_t word = r < here && j < words ? packed[(b * WIDE + r) * words + j] : 0;
                    to[j * WIDE + r] = bits == 4 ? shuffle(word) : word;
                }
        }
    };
    over(up(rows, WIDE), 1, nthreads, body);
    return QK_OK;
}

int qk_restore(const uint32_t* codes, uint32_t* packed, int64_t rows, int64_t cols, int bits, int nthreads) {
    if (const int bad = check(rows, cols, bits)) return bad;
    if (!packed || !codes) return QK_NULL;
    const int64_t words = up(cols * bits, 32), padded = eights(cols) * bits / 4;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t j = 0; j < words; ++j) {
                const uint32_t word = codes[(r / WIDE * padded + j) * WIDE + r % WIDE];
                packed[r * words + j] = bits == 4 ? unshuffle(word) : word;
            }
    };
    over(rows, WIDE, nthreads, body);
    return QK_OK;
}

namespace {

int multiply(const QkWeight& w, const char* x, int x_dtype, const char* bias, char* out, int64_t m, int int8, int isa,
             int nthreads) {
    const RowKernels* row_kernels = kernels_for(isa);
    PickFn pick = matmul_for(isa);
    if (!row_kernels || !pick) return QK_BAD_ISA;
    Plan p;
    p.limbs = w.table ? 0 : int8 ? 1 : x_dtype == QK_F32 ? 3 : 2;
    if (!choose(p, pick, w.bits, m)) return QK_BAD_SHAPE;
    // Only bfloat16 inputs may be multiplied as bfloat16.
    if (p.tile.layout == Layout::PAIRS && x_dtype != QK_BF16 && !choose(p, matmul_for(QK_AVX512), w.bits, m))
        return QK_BAD_SHAPE;
    const std::vector<Block> blocks = blocks_of(w);
    const int64_t n_blocks = (int64_t)blocks.size(), inputs = eights(w.cols) * 8, x_item = itemsize(x_dtype);
    measure(p, blocks, inputs);

    const int64_t chunk = CHUNK / p.rows, tile_bytes = p.bytes();
    const int64_t slab = least(p.tiles, most(SLAB / (chunk * tile_bytes), 1) * chunk);  // tiles, whole chunks
    static thread_local Scratch scratch;
    char* base = scratch.get((size_t)(tile_bytes * slab));
    if (!base) return QK_NO_MEMORY;
    auto part = [&](int64_t t, TileArgs& a) {
        char* at = base + t * tile_bytes;
        a.x = at;
        a.start = (const int32_t*)(at += p.x_bytes);
        a.x_scale = (const float*)(at += 4 * p.start_items);
        a.x_sum = (const float*)(at += 4 * p.row_items);
    };

    const int64_t across = up(w.rows, WIDE), code_words = inputs / 8 * w.bits / 4 * WIDE, scales = w.groups * WIDE;
    for (int64_t done = 0; done < p.tiles; done += slab) {
        const int64_t tiles = least(slab, p.tiles - done), first_row = done * p.rows;
        const int64_t here = least(m - first_row, tiles * p.rows);
        const char* from = x + first_row * w.cols * x_item;
        char* to = out + first_row * w.rows * x_item;
        if (here < tiles * p.rows) std::memset(base + (tiles - 1) * tile_bytes, 0, (size_t)tile_bytes);

        auto lay_out = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                TileArgs a;
                part(r / p.rows, a);
                const PrepareArgs args{blocks.data(), n_blocks, w.cols, p.rows, p.row_bytes, p.limbs, p.tile.layout,
                                       w.zero == nullptr, 1 << (w.bits - 1), (void*)a.x, (int32_t*)a.start,
                                       (float*)a.x_scale, (float*)a.x_sum};
                row_kernels->prepare(args, from + r * w.cols * x_item, x_dtype, r % p.rows);
            }
        };
        // The rows of a tile are interleaved, byte by byte, but for Layout::ROWS: one thread then takes whole tiles.
        const int64_t unit = p.tile.layout == Layout::ROWS ? 1 : p.rows;
        over(here, up(32768, inputs * unit) * unit, nthreads, lay_out);

        const int64_t chunks = up(tiles, chunk);
        auto products = [&](int64_t begin, int64_t end) {
            alignas(64) float total[CHUNK * WIDE];
            for (int64_t item = begin; item < end; ++item) {
                const int64_t c = item / across, n = item % across;
                const int64_t first = c * chunk, last = least(first + chunk, tiles);
                TileArgs a;
                a.codes = w.codes + n * code_words;
                a.scale = (const char*)w.scale + n * scales * itemsize(w.scale_dtype);
                a.zero = w.zero ? w.zero + n * scales : nullptr;
                a.table = w.table;
                a.scale_dtype = w.scale_dtype;
                a.blocks = blocks.data();
                a.rows = p.rows;
                a.row_bytes = p.row_bytes;
                std::memset(total, 0, (size_t)((last - first) * p.rows * WIDE) * sizeof(float));
                const int64_t panel = last - first == 1 ? n_blocks : PANEL;  // one tile reads the weights once anyway
                for (int64_t b = 0; b < n_blocks; b += panel)
                    for (int64_t t = first; t < last; ++t) {
                        part(t, a);
                        p.tile.run(a, b, least(b + panel, n_blocks), total + (t - first) * p.rows * WIDE);
                    }
                const int64_t columns = least(WIDE, w.rows - n * WIDE);
                for (int64_t r = first * p.rows; r < least(last * p.rows, here); ++r)
                    row_kernels->finish(total + (r - first * p.rows) * WIDE, bias ? bias + n * WIDE * x_item : nullptr,
                                        to + (r * w.rows + n * WIDE) * x_item, x_dtype, columns);
            }
        };
        // Pieces of some ten microseconds: handing one out is nothing beside it, and a thread that was held up leaves
        // little.
        const int64_t work = code_words * p.width * least(chunk, tiles);  // words times virtual rows, an item
        over(chunks * across, up(49152, work), nthreads, products);
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
