// The C ABI of ggml's block types: checks, then spreads groups of sixteen rows over threads.
#include "pool.h"
#include "qkit_cpu.h"
#include "rows.h"
#include "sizes.h"

using namespace qkit;

namespace {

bool is_grid(const QkGrid& g) {
    if ((g.sub != 16 && g.sub != 32) || g.low < -1024 || g.high > 1024 || g.low >= g.high || g.high - g.low > 255)
        return false;
    if (g.most < 0 || g.most > 1024 || g.least < -1024 || (g.most && !g.affine && g.least >= 0)) return false;
    if (g.n_levels < 0 || g.n_levels > 256 || g.n_targets < 0) return false;
    return (!g.n_levels || g.levels) && (!g.n_targets || g.targets);
}

}  // namespace

int qk_ggml_fit(const void* w, int w_dtype, const float* weight, const QkGrid* grid, uint8_t* codes, uint16_t* d,
                uint16_t* dmin, int16_t* scales, int16_t* minima, double* stats, double* totals, int64_t rows,
                int64_t cols, int isa, int nthreads) {
    constexpr int64_t LANES = 16, SUPER = 256;
    const RowKernels* k = kernels_for(isa);
    if (!k) return QK_BAD_ISA;
    if (!is_dtype(w_dtype)) return QK_BAD_DTYPE;
    if (!grid) return QK_NULL;
    if (!is_grid(*grid) || rows < 0 || cols < 0 || too_large(rows, cols)) return QK_BAD_SHAPE;
    const int64_t size = grid->most ? SUPER : grid->sub, blocks = cols / size, subs = cols / grid->sub;
    if (cols % size) return QK_BAD_SHAPE;
    if (!totals) return QK_NULL;
    totals[0] = totals[1] = 0.0;
    if (!rows || !cols) return QK_OK;
    if (!w || !codes || !d || !stats || (grid->affine && !dmin)) return QK_NULL;
    if (grid->most && (!scales || (grid->affine && !minima))) return QK_NULL;
    const BlockGrid g{grid->sub,  grid->low,  grid->high,     grid->affine,    grid->power, grid->least,
                      grid->most, grid->n_levels, grid->n_targets, grid->levels, grid->targets};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice) {
            const int64_t r = slice * LANES;
            const GgmlArgs args{g,
                                w_dtype,
                                cols,
                                weight,
                                d + r * blocks,
                                dmin ? dmin + r * blocks : nullptr,
                                scales ? scales + r * subs : nullptr,
                                minima ? minima + r * subs : nullptr,
                                stats + 2 * slice};
            k->ggml(args, (const char*)w + r * cols * itemsize(w_dtype), codes + r * cols, least(LANES, rows - r));
        }
    };
    over(up(rows, LANES), 1, nthreads, body);
    for (int64_t slice = 0; slice < up(rows, LANES); ++slice) {  // in order: the sums do not depend on the threads
        totals[0] += stats[2 * slice];
        totals[1] += stats[2 * slice + 1];
    }
    return QK_OK;
}
