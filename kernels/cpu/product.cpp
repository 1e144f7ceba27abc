#include "product.h"

#include <cstring>

#include "sizes.h"

namespace qkit {
namespace {

constexpr int64_t BLOCK = BLOCK_INPUTS / 8;  // in eights of inputs
constexpr int64_t PANEL = 4;  // blocks of inputs a tile takes at a time: 8 KiB of 4-bit codes, in the first-level cache

}  // namespace

// The size of tile that takes least time: products for its rows (those that pad the last tile included), and for each tile
// once more what unpacks the codes, about as much as three quarters of a row. A tile product does the work of eight.
bool Product::choose(PickFn pick, int64_t m) {
    static const int64_t SIZES[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48};
    int64_t cheapest = 0;
    for (const int64_t size : SIZES) {
        const Tile found = pick(bits, limbs, size);
        if (!found.run || (limbs == 0 && !table && found.layout != Layout::STRIPS)) continue;
        int64_t row = limbs > 1 ? 8 * limbs : 8, codes = 6;
        switch (found.layout) {
            case Layout::ROWS: row /= 8; break;
            case Layout::STRIPS: codes = 5 * bits; break;
            case Layout::SHORTS: row = limbs > 2 ? 16 : 8, codes = std::min<int64_t>(5 * size + 1, 20); break;
            default: break;
        }
        const int64_t cost = ceil_div(m, size) * (size * row + codes);
        if (cheapest && cost >= cheapest) continue;
        cheapest = cost;
        tile = found;
        rows = size;
        tiles = ceil_div(m, size);
    }
    return cheapest != 0;
}

int Product::plan(const QkWeight& w, int64_t m, int dtype, int wanted, int isa) {
    const PickFn pick = matmul_for(isa);
    kernels = kernels_for(isa);
    if (!kernels || !pick) return QK_BAD_ISA;
    bits = w.bits, cols = w.cols, groups = w.groups, x_dtype = dtype, limbs = wanted, table = w.table;
    if (!choose(pick, m)) return QK_BAD_SHAPE;
    // Only bfloat16 inputs may be multiplied as bfloat16.
    const bool halves = tile.layout == Layout::PAIRS || tile.layout == Layout::STRIPS;
    if (halves && x_dtype != QK_BF16 && !choose(matmul_for(QK_AVX512), m)) return QK_BAD_SHAPE;

    inputs = ceil_div(cols, 8) * 8;
    blocks.clear();
    const int64_t group = groups == 1 ? inputs / 8 : cols / groups / 8;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t at = 0; at < group; at += BLOCK) blocks.push_back({g, g * group + at, std::min<int64_t>(BLOCK, group - at)});

    const int64_t n_blocks = (int64_t)blocks.size();
    int64_t longest = 0;
    for (const Block& b : blocks) longest = std::max<int64_t>(b.steps, longest);
    chunk = CHUNK / rows;
    const bool shorts = tile.layout == Layout::SHORTS;
    width = rows * (shorts ? (limbs > 2 ? 2 : 1) : limbs ? limbs : 1);
    row_bytes = ceil_div(longest * 8, 64) * 64;
    strip = inputs / 2 * (shorts ? short_strip(rows) : STRIP);
    switch (tile.layout) {
        case Layout::QUADS: x_bytes = inputs * width; break;
        case Layout::ROWS: x_bytes = n_blocks * row_bytes * width; break;
        case Layout::FLOATS: x_bytes = inputs * width * 4; break;
        case Layout::PAIRS:
        case Layout::STRIPS:
        case Layout::SHORTS: x_bytes = inputs * width * 2; break;
    }
    x_bytes = ceil_div(x_bytes, 64) * 64;
    start_items = ceil_div(n_blocks * width, 16) * 16;
    row_items = ceil_div(n_blocks * rows, 16) * 16;
    return QK_OK;
}

bool Product::uneven(const char* x, int64_t row) const {
    if (limbs != 2) return false;
    return kernels->uneven(blocks.data(), (int64_t)blocks.size(), x + row * cols * itemsize(x_dtype), x_dtype, cols);
}

void Product::part(char* base, int64_t t, TileArgs& a) const {
    char* at = base + t * tile_bytes();
    a.x = at;
    a.start = (const int32_t*)(at += x_bytes);
    a.x_scale = (const float*)(at += 4 * start_items);
    a.x_sum = (const float*)(at += 4 * row_items);
}

void Product::clear(char* base, int64_t count, int64_t here) const {
    if (here < count * rows) std::memset(base + (count - 1) * tile_bytes(), 0, (size_t)tile_bytes());
}

void Product::lay_out(const QkWeight& w, char* base, const char* x, int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
        TileArgs a;
        part(base, r / rows, a);
        const PrepareArgs args{blocks.data(), (int64_t)blocks.size(), cols, rows, row_bytes, strip, limbs, tile.layout,
                               w.zero == nullptr, 1 << (bits - 1), (void*)a.x, (int32_t*)a.start, (float*)a.x_scale,
                               (float*)a.x_sum};
        kernels->prepare(args, x + r * cols * itemsize(x_dtype), x_dtype, r % rows);
    }
}

int64_t Product::across(const QkWeight& w) { return ceil_div(w.rows, WIDE); }
int64_t Product::items(const QkWeight& w, int64_t count) const { return ceil_div(count, chunk) * across(w); }

void Product::multiply(const QkWeight& w, char* base, int64_t count, int64_t here, const char* bias, char* out,
                       int64_t begin, int64_t end) const {
    alignas(64) float total[CHUNK * WIDE];
    const int64_t n_blocks = (int64_t)blocks.size(), x_item = itemsize(x_dtype), wide = across(w);
    const int64_t code_words = inputs / 8 * bits / 4 * WIDE, scales = groups * WIDE;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t c = item / wide, n = item % wide;
        const int64_t first = c * chunk, last = std::min<int64_t>(first + chunk, count);
        TileArgs a;
        a.codes = w.codes + n * code_words;
        a.end = a.codes + std::min<int64_t>(end - item, wide - n) * code_words;
        a.scale = (const char*)w.scale + n * scales * itemsize(w.scale_dtype);
        a.zero = w.zero ? w.zero + n * scales : nullptr;
        a.table = w.table;
        a.scale_dtype = w.scale_dtype;
        a.blocks = blocks.data();
        a.rows = rows;
        a.row_bytes = row_bytes;
        a.strip = strip;
        std::memset(total, 0, (size_t)((last - first) * rows * WIDE) * sizeof(float));
        const int64_t panel = last - first == 1 ? n_blocks : PANEL;  // one tile reads the weights once anyway
        for (int64_t b = 0; b < n_blocks; b += panel)
            for (int64_t t = first; t < last; ++t) {
                part(base, t, a);
                tile.run(a, b, std::min<int64_t>(b + panel, n_blocks), total + (t - first) * rows * WIDE);
            }
        const int64_t columns = std::min<int64_t>(WIDE, w.rows - n * WIDE);
        for (int64_t r = first * rows; r < std::min<int64_t>(last * rows, here); ++r)
            kernels->finish(total + (r - first * rows) * WIDE, bias ? bias + n * WIDE * x_item : nullptr,
                            out + (r * w.rows + n * WIDE) * x_item, x_dtype, columns);
    }
}

}  // namespace qkit
