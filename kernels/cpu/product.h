// A product of activations and a weight in parts: a row of activations is laid out, 32 outputs are computed. Any thread may
// take any part; all rows are laid out before the first product. Who runs the parts: qk_matmul and qk_decode.
#pragma once
#include <cstdlib>
#include <vector>

#include "matmul_types.h"
#include "qkit_cpu.h"
#include "rows.h"

namespace qkit {

constexpr int64_t CHUNK = 48;  // rows of activations a pass over the weights serves: they stay in the second-level cache

// A scratch buffer, aligned to a page, kept for the next use unless it is large. Null when memory is short.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    Scratch() = default;
    Scratch(const Scratch&) = delete;
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

// How m rows times a weight of this shape are cut into tiles, and what a tile of activations takes of the scratch.
struct Product {
    const RowKernels* kernels;
    Tile tile;
    int limbs, bits, x_dtype;
    bool table;  // a codebook's values
    int64_t cols, groups, inputs;
    int64_t rows, tiles, chunk, width;        // rows of a tile, tiles in all and in a chunk, virtual rows of a tile
    int64_t row_bytes;                        // Layout::ROWS
    int64_t strip;                            // Layout::STRIPS, SHORTS
    int64_t x_bytes, start_items, row_items;  // of one tile
    std::vector<Block> blocks;

    // A QkStatus. limbs: 1 to 3, or 0 for a codebook and where activations are multiplied as they are.
    int plan(const QkWeight& w, int64_t m, int x_dtype, int limbs, int isa);
    // Whether row `row` of x needs three limbs where this is planned for two.
    bool uneven(const char* x, int64_t row) const;
    // Rows of a tile that share cache lines.
    int64_t interleaved() const {
        switch (tile.layout) {
            case Layout::ROWS: return 1;
            case Layout::STRIPS: return STRIP;
            case Layout::SHORTS: return short_strip(rows);
            default: return rows;
        }
    }
    int64_t tile_bytes() const { return x_bytes + 4 * (start_items + 2 * row_items); }

    // Rows begin .. end of x into `base` [tile_bytes, for each tile]; only bits, symmetry and shape of the weight count.
    // `clear` first: rows that pad the last tile are zero.
    void clear(char* base, int64_t tiles, int64_t here) const;
    void lay_out(const QkWeight& w, char* base, const char* x, int64_t begin, int64_t end) const;

    // Items are chunks of tiles times blocks of 32 outputs. `here` rows of `tiles` tiles are written.
    static int64_t across(const QkWeight& w);
    int64_t items(const QkWeight& w, int64_t tiles) const;
    void multiply(const QkWeight& w, char* base, int64_t tiles, int64_t here, const char* bias, char* out, int64_t begin,
                  int64_t end) const;

  private:
    bool choose(PickFn pick, int64_t m);
    void part(char* base, int64_t t, TileArgs& a) const;
};

// Limbs of m rows of activations (activations.h); uneven: where some row of 16-bit ones is. Many rows of bfloat16 are
// multiplied as they are where that is no slower.
inline int limbs_of(const QkWeight& w, int x_dtype, int int8, bool uneven, int64_t m, int isa) {
    if (w.table) return 0;
    if (int8) return 1;
    if (isa == QK_AVX512BF16 && x_dtype == QK_BF16 && m >= CHUNK) return 0;
    return x_dtype == QK_F32 || uneven ? 3 : 2;
}

}  // namespace qkit
