// Weights -> codes and scales of ggml's block types (kernels/ggml/reference.py, to which this is equal bit for bit). Sixteen
// rows are sixteen lanes: the same columns, and so the same importances, in every lane, and sums run over the values of
// a sub-block in order. Products and sums are rounded one by one.
#pragma once
#include "lanes.h"
#include "quantize.h"
#include "rows.h"

namespace {

QK_INLINE I above(F a, F b) { I r; QK_EACH r.v[p] = (RawI)(a.v[p] > b.v[p]); return r; }
QK_INLINE I differ(F a, F b) { I r; QK_EACH r.v[p] = (RawI)(a.v[p] != b.v[p]); return r; }
QK_INLINE F pick(I mask, F a, F b) { QK_EACH a.v[p] = mask.v[p] ? a.v[p] : b.v[p]; return a; }
QK_INLINE F clamp(F x, F least, F most) { return min(max(x, least), most); }

constexpr int SUPER = 256;

// One sub-block of sixteen rows on a grid. TABLE: levels are those of a codebook.
template <bool TABLE>
struct SubBlock {
    const qkit::BlockGrid& g;
    const float (*x)[LANES];
    const float* w;  // importance of each column; null: all the same

    F weighed(int j, F v) const { return w ? splat(w[j]) * v : v; }
    F level(F v) const {
        if constexpr (!TABLE) return (clamp(v, splat((float)g.low), splat((float)g.high)) + splat(MAGIC)) - splat(MAGIC);
        F r = splat(g.levels[0]);
        for (int k = 1; k < g.n_levels; ++k)
            r = r + pick(above(v, splat((g.levels[k] + g.levels[k - 1]) * 0.5f)), splat(g.levels[k] - g.levels[k - 1]),
                         splat(0.0f));
        return r;
    }
    void range(F& low, F& high) const {
        low = high = load(x[0]);
        for (int j = 1; j < g.sub; ++j) low = min(low, load(x[j])), high = max(high, load(x[j]));
    }

    // The scale, of either sign, of least weighted error.
    F symmetric() const {
        const F none = splat(0.0f);
        F low, high;
        range(low, high);
        const F extreme = pick(above(none - low, high), low, high);
        const F inverse = pick(differ(extreme, none), splat(1.0f) / extreme, none);
        F scale = none, best = none;
        for (int t = 0; t < g.n_targets; ++t) {
            const F by = inverse * splat(g.targets[t]);
            F xq = none, qq = none;
            for (int j = 0; j < g.sub; ++j) {
                const F v = load(x[j]), q = level(v * by), wq = weighed(j, q);
                xq = xq + wq * v;
                qq = qq + wq * q;
            }
            const F s = pick(above(qq, none), xq / qq, none), gain = s * xq;
            const I better = above(gain, best);
            best = pick(better, gain, best);
            scale = pick(better, s, scale);
        }
        return scale;
    }

    // The scale and the minimum, value = scale * code - minimum. with_sign: the minimum may be below zero.
    void affine(bool with_sign, F& scale, F& minimum) const {
        const F none = splat(0.0f), worst = splat(-__builtin_inff());
        F low, high;
        range(low, high);
        if (!with_sign) low = min(low, none);
        const F span = high - low;
        F sw = none, sx = none;
        for (int j = 0; j < g.sub; ++j) {
            const F v = load(x[j]);
            sw = sw + weighed(j, splat(1.0f));
            sx = sx + weighed(j, v);
        }
        F s0 = none, m0 = low, best = worst;
        auto attempt = [&](F offset, F by) {
            F sq = none, sqq = none, sxq = none;
            for (int j = 0; j < g.sub; ++j) {
                const F v = load(x[j]), q = level((v - offset) * by), wq = weighed(j, q);
                sq = sq + wq;
                sqq = sqq + wq * q;
                sxq = sxq + wq * v;
            }
            const F det = sw * sqq - sq * sq;
            const I good = above(det, none);  // else all codes are the same
            F s = pick(good, (sw * sxq - sx * sq) / det, none);
            F m = pick(good, (sqq * sx - sq * sxq) / det, none);
            if (!with_sign) {
                const I alone = above(m, none) | without(splat(-1), good);
                m = pick(alone, none, m);
                s = pick(alone, pick(above(sqq, none), sxq / sqq, none), s);
            }
            const F gain = pick(above(s, none), s * sxq + m * sx, worst);
            const I better = above(gain, best);
            best = pick(better, gain, best);
            s0 = pick(better, s, s0);
            m0 = pick(better, m, m0);
        };
        const F inverse = pick(above(span, none), splat(1.0f) / span, none);
        for (int t = 0; t < g.n_targets; ++t) attempt(low, inverse * splat(g.targets[t]));
        attempt(m0, pick(above(s0, none), splat(1.0f) / s0, none));
        scale = s0;
        minimum = none - m0;
    }

    // What is lost with these as they are stored.
    F loss(F scale, F minimum) const {
        const F none = splat(0.0f);
        const F inverse = pick(differ(scale, none), splat(1.0f) / scale, none);
        F total = none;
        for (int j = 0; j < g.sub; ++j) {
            const F v = load(x[j]);
            const F e = v - (scale * level((v + minimum) * inverse) - minimum);
            total = total + weighed(j, e) * e;
        }
        return total;
    }

    // The codes; what is lost, and how much there was, is added to `lost` and `total`.
    void write(F scale, F minimum, uint8_t (*codes)[LANES], F& lost, F& total) const {
        const F none = splat(0.0f);
        const F inverse = pick(differ(scale, none), splat(1.0f) / scale, none);
        F e2 = none, n2 = none;
        for (int j = 0; j < g.sub; ++j) {
            const F x0 = load(x[j]), v = (x0 + minimum) * inverse;
            F q;
            if constexpr (TABLE) {
                I code = splat(0);
                q = splat(g.levels[0]);
                for (int k = 1; k < g.n_levels; ++k) {
                    const I beyond = above(v, splat((g.levels[k] + g.levels[k - 1]) * 0.5f));
                    code = code - beyond;
                    q = q + pick(beyond, splat(g.levels[k] - g.levels[k - 1]), none);
                }
                store_u8(codes[j], code);
            } else {
                const F raised = clamp(v, splat((float)g.low), splat((float)g.high)) + splat(MAGIC);
                q = raised - splat(MAGIC);
                store_u8(codes[j], bits_of(raised) - splat((int)as_bits(MAGIC) + g.low));
            }
            const F e = x0 - (scale * q - minimum);
            e2 = e2 + e * e;
            n2 = n2 + x0 * x0;
        }
        lost = lost + e2;
        total = total + n2;
    }
};

QK_INLINE F to_half(F x, uint16_t* kept) {
    F16::store16(kept, x);
    return F16::load16(kept);
}
QK_INLINE void put(int16_t* at, int64_t step, int64_t n, F x) {
    float lanes[LANES];
    store(lanes, x);
    for (int64_t r = 0; r < n; ++r) at[r * step] = (int16_t)lanes[r];
}
QK_INLINE void put(uint16_t* at, int64_t step, int64_t n, const uint16_t* kept) {
    for (int64_t r = 0; r < n; ++r) at[r * step] = kept[r];
}

// A block whose scale is a number of its own: one sub-block.
template <bool TABLE>
void fit_alone(const qkit::GgmlArgs& a, const SubBlock<TABLE>& block, int64_t index, int64_t n, uint8_t (*codes)[LANES],
               F& lost, F& total) {
    const qkit::BlockGrid& g = a.grid;
    const int64_t blocks = a.cols / g.sub;
    const F none = splat(0.0f);
    uint16_t d[LANES], m[LANES];
    F scale, minimum = none;
    if (g.power) {  // of two, a byte: around the one at which the largest weight is in the upper half of the grid
        F low, high;
        block.range(low, high);
        const I exponent = bits_of(max(high, none - low)) >> 23;
        F best = none, chosen = none;
        for (int step = -1; step <= 1; ++step) {
            const F e = clamp(to_float(exponent + splat(step - 2)), splat(2.0f), splat(254.0f));
            const F s = from_bits(bits_of((e - splat(1.0f)) + splat(MAGIC)) << 23);
            const F left = block.loss(s, none);
            const I better = step < 0 ? splat(-1) : above(best, left);
            best = pick(better, left, best);
            chosen = pick(better, e, chosen);
        }
        put((int16_t*)a.d + index, blocks, n, chosen);
        scale = from_bits(bits_of((chosen - splat(1.0f)) + splat(MAGIC)) << 23);
    } else if (g.affine) {
        block.affine(true, scale, minimum);
        scale = to_half(scale, d);
        minimum = none - to_half(none - minimum, m);
        put(a.d + index, blocks, n, d);
        put(a.dmin + index, blocks, n, m);
    } else {
        if (g.n_targets) {
            scale = block.symmetric();
        } else {
            F low, high;
            block.range(low, high);
            scale = max(high, none - low) * splat((float)(1.0 / g.high));
        }
        scale = to_half(scale, d);
        put(a.d + index, blocks, n, d);
    }
    block.write(scale, minimum, codes, lost, total);
}

// A super-block: the scales of its sub-blocks are integers times a float16.
template <bool TABLE>
void fit_super(const qkit::GgmlArgs& a, const float (*x)[LANES], const float* w, int64_t index, int64_t n,
               uint8_t (*codes)[LANES], F& lost, F& total) {
    const qkit::BlockGrid& g = a.grid;
    constexpr int MOST_SUBS = 16;
    const int subs = SUPER / g.sub;
    const int64_t blocks = a.cols / SUPER, all = a.cols / g.sub;
    const F none = splat(0.0f), least = splat((float)g.least), most = splat((float)g.most), one = splat(1.0f);
    F scale[MOST_SUBS], minimum[MOST_SUBS];
    F low = none, high = none, deepest = none;
    auto part = [&](int k) { return SubBlock<TABLE>{g, x + k * g.sub, w ? w + k * g.sub : nullptr}; };
    for (int k = 0; k < subs; ++k) {
        minimum[k] = none;
        if (g.affine) part(k).affine(false, scale[k], minimum[k]);
        else scale[k] = part(k).symmetric();
        low = min(low, scale[k]), high = max(high, scale[k]), deepest = max(deepest, minimum[k]);
    }
    uint16_t kept[LANES];
    F d, dmin = none;
    if (g.affine) {
        d = to_half(high * splat((float)(1.0 / g.most)), kept);
        put(a.d + index, blocks, n, kept);
        dmin = to_half(deepest * splat((float)(1.0 / g.most)), kept);
        put(a.dmin + index, blocks, n, kept);
    } else {
        d = to_half(pick(above(none - low, high), low, high) * splat((float)(1.0 / g.least)), kept);
        put(a.d + index, blocks, n, kept);
    }
    const F by = pick(differ(d, none), one / d, none), mby = pick(differ(dmin, none), one / dmin, none);
    auto whole = [](F v) { return (v + splat(MAGIC)) - splat(MAGIC); };
    static const float STEPS[3] = {0.0f, -1.0f, 1.0f};
    for (int k = 0; k < subs; ++k) {
        const F near = whole(clamp(scale[k] * by, least, most)), near_m = whole(clamp(minimum[k] * mby, none, most));
        F best = none, sc = near, mn = near_m;
        for (int i = 0; i < (g.affine ? 9 : 3); ++i) {
            const F s = clamp(near + splat(STEPS[g.affine ? i / 3 : i]), least, most);
            const F m = g.affine ? clamp(near_m + splat(STEPS[i % 3]), none, most) : none;
            const F left = part(k).loss(d * s, dmin * m);
            const I better = i == 0 ? splat(-1) : above(best, left);
            best = pick(better, left, best);
            sc = pick(better, s, sc);
            mn = pick(better, m, mn);
        }
        put(a.scales + index * subs + k, all, n, sc);
        if (g.affine) put(a.minima + index * subs + k, all, n, mn);
        part(k).write(d * sc, dmin * mn, codes + k * g.sub, lost, total);
    }
}

template <class W, bool TABLE>
void ggml_rows(const qkit::GgmlArgs& a, const typename W::T* w, uint8_t* codes, int64_t n) {
    const qkit::BlockGrid& g = a.grid;
    const bool super = g.most != 0;
    const int64_t size = super ? SUPER : g.sub;
    float x[SUPER][LANES];
    uint8_t found[SUPER][LANES];
    std::memset(x, 0, sizeof x);
    double sums[2] = {0.0, 0.0};
    for (int64_t index = 0; index < a.cols / size; ++index) {
        const int64_t c = index * size;
        for (int64_t r = 0; r < n; ++r)
            for (int64_t j = 0; j < size; j += LANES) {
                float lanes[LANES];
                store(lanes, W::load16(w + r * a.cols + c + j));
                for (int k = 0; k < LANES; ++k) x[j + k][r] = lanes[k];
            }
        const float* weight = a.weight ? a.weight + c : nullptr;
        F lost = splat(0.0f), total = splat(0.0f);
        if (super) fit_super<TABLE>(a, x, weight, index, n, found, lost, total);
        else fit_alone<TABLE>(a, SubBlock<TABLE>{g, x, weight}, index, n, found, lost, total);
        float lanes[2][LANES];
        store(lanes[0], lost);
        store(lanes[1], total);
        for (int k = 0; k < 2; ++k)
            for (int64_t r = 0; r < n; ++r) sums[k] += (double)lanes[k][r];
        for (int64_t r = 0; r < n; ++r)
            for (int64_t j = 0; j < size; ++j) codes[r * a.cols + c + j] = found[j][r];
    }
    a.stats[0] = sums[0];
    a.stats[1] = sums[1];
}

// n <= 16 rows; `a` points to where the first one's results go.
void ggml(const qkit::GgmlArgs& a, const void* w, uint8_t* codes, int64_t n) {
    const bool table = a.grid.n_levels != 0;
    switch (a.w_dtype) {
        case QK_F32:
            return table ? ggml_rows<F32, true>(a, (const float*)w, codes, n)
                         : ggml_rows<F32, false>(a, (const float*)w, codes, n);
        case QK_F16:
            return table ? ggml_rows<F16, true>(a, (const uint16_t*)w, codes, n)
                         : ggml_rows<F16, false>(a, (const uint16_t*)w, codes, n);
        default:
            return table ? ggml_rows<BF16, true>(a, (const uint16_t*)w, codes, n)
                         : ggml_rows<BF16, false>(a, (const uint16_t*)w, codes, n);
    }
}

}  // namespace
