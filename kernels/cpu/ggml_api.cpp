// The C ABI of ggml's block types: checks, then spreads groups of sixteen rows over threads.
#include "pool.h"
#include "qkit_cpu.h"
#include "rows.h"
#include "sizes.h"

using namespace qkit;

namespace {

constexpr int64_t LANES = 16, SUPER = 256;

bool is_grid(const QkGrid& g) {
    if ((g.sub != 16 && g.sub != 32) || g.low < -1024 || g.high > 1024 || g.low >= g.high || g.high - g.low > 255)
        return false;
    if (g.most < 0 || g.most > 1024 || g.least < -1024 || (g.most && !g.affine && g.least >= 0)) return false;
    if (g.n_levels < 0 || g.n_levels > 256 || g.n_targets < 0 || g.n_pieces < 0) return false;
    return (!g.n_levels || g.levels) && (!g.n_targets || g.targets) && (!g.n_pieces || g.pieces);
}

// Bytes of a block, -1 where a piece is none.
int64_t bytes_of(const QkGrid& g, int64_t size) {
    const int64_t subs = size / g.sub, scales = g.most ? (g.affine ? 2 * subs : subs) : 0;
    int64_t total = 0;
    for (int i = 0; i < g.n_pieces; ++i) {
        const QkPiece& p = g.pieces[i];
        if (p.part == QK_D || p.part == QK_DMIN) {
            total += p.part == QK_D && g.power ? 1 : 2;
        } else if (p.part == QK_CODES || p.part == QK_SCALES) {
            if ((p.bits != 1 && p.bits != 2 && p.bits != 4 && p.bits != 8) || p.shift < 0 || p.shift > 7 || p.run < 1)
                return -1;
            const int64_t n = p.part == QK_CODES ? size : scales, per = 8 / p.bits;
            if (!n || p.run > n || n % (p.run * per)) return -1;
            total += n / per;
        } else if (p.part == QK_SCALE_MIN && scales == 16 && g.affine) {
            total += 12;
        } else {
            return -1;
        }
    }
    return total > 0 && total <= 2 * size ? total : -1;
}

}  // namespace

int qk_ggml_encode(const void* w, int w_dtype, const float* weight, const QkGrid* grid, uint8_t* out, double* stats,
                   double* totals, int64_t rows, int64_t cols, int isa, int nthreads) {
    const RowKernels* k = kernels_for(isa);
    if (!k) return QK_BAD_ISA;
    if (!is_dtype(w_dtype)) return QK_BAD_DTYPE;
    if (!grid) return QK_NULL;
    if (!is_grid(*grid) || rows < 0 || cols < 0 || too_large(rows, cols)) return QK_BAD_SHAPE;
    const int64_t size = grid->most ? SUPER : grid->sub, bytes = bytes_of(*grid, size);
    if (bytes < 0 || cols % size) return QK_BAD_SHAPE;
    if (!totals) return QK_NULL;
    totals[0] = totals[1] = 0.0;
    if (!rows || !cols) return QK_OK;
    if (!w || !out || !stats) return QK_NULL;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice) {
            const int64_t r = slice * LANES;
            const GgmlArgs args{*grid, (int)bytes, w_dtype, cols, weight, stats + 3 * slice};
            k->ggml(args, (const char*)w + r * cols * itemsize(w_dtype), out + r * (cols / size) * bytes,
                    std::min<int64_t>(LANES, rows - r));
        }
    };
    {
        // Conversion encodes several matrices at a time, each in a thread: a team of OpenMP for each of them would wait, at
        // every end, for threads that have no core.
        const OwnThreads mine;
        parallel_for(ceil_div(rows, LANES), 1, nthreads, body);
    }
    double outside = 0.0;
    for (int64_t slice = 0; slice < ceil_div(rows, LANES); ++slice) {  // in order: the sums do not depend on the threads
        totals[0] += stats[3 * slice];
        totals[1] += stats[3 * slice + 1];
        outside += stats[3 * slice + 2];
    }
    return outside ? QK_SCALE_OVERFLOW : QK_OK;
}
