// Codes and scales of ggml's blocks (kernels/ggml/reference.py, to which this is equal bit for bit). Sixteen rows are
// sixteen lanes: the same columns, and so the same importances, in every lane, and sums run over the values of a sub-block
// in order. Products and sums are rounded one by one, or fused where the product is exact.
#pragma once
#include <cmath>
#include <type_traits>

#include "lanes.h"
#include "quantize.h"
#include "rows.h"

namespace {

QK_INLINE I above(F a, F b) { I r; QK_EACH r.v[p] = (RawI)(a.v[p] > b.v[p]); return r; }
QK_INLINE I differ(F a, F b) { I r; QK_EACH r.v[p] = (RawI)(a.v[p] != b.v[p]); return r; }
QK_INLINE F pick(I mask, F a, F b) { QK_EACH a.v[p] = mask.v[p] ? a.v[p] : b.v[p]; return a; }
QK_INLINE F clamp(F x, F least, F most) { return min(max(x, least), most); }

constexpr int SUPER = 256;

// One sub-block of sixteen rows on a grid. TABLE: levels are those of a codebook. EXACT: a value times a level has no more
// bits than a float (weights of 16 bits).
template <bool TABLE, bool EXACT>
struct SubBlock {
    const QkGrid& g;
    const float (*x)[LANES];
    const float* w;  // importance of each column; null: all the same

    F weighed(int j, F v) const { return w ? splat(w[j]) * v : v; }
    template <bool LEAST, bool MOST>
    F level(F v) const {
        if constexpr (!TABLE) {
            if constexpr (LEAST) v = max(v, splat((float)g.low));
            if constexpr (MOST) v = min(v, splat((float)g.high));
            return (v + splat(MAGIC)) - splat(MAGIC);
        }
        F r = splat(g.levels[0]);
        for (int k = 1; k < g.n_levels; ++k)
            r = r + pick(above(v, splat((g.levels[k] + g.levels[k - 1]) * 0.5f)), splat(g.levels[k] - g.levels[k - 1]),
                         splat(0.0f));
        return r;
    }
    F level(F v) const { return level<true, true>(v); }
    void range(F& low, F& high) const {
        low = high = load(x[0]);
        for (int j = 1; j < g.sub; ++j) low = min(low, load(x[j])), high = max(high, load(x[j]));
    }
    // Calls run(weighed, least, most), constants: whether values from `least` to `most` need a clamp at the grid's ends.
    template <class Run>
    void bounded(float least, float most, Run run) const {
        constexpr float ROUNDED = 0.499f;  // half a level, and what rounding may add to the value
        const std::true_type yes;
        const std::false_type no;
        if (w) return run(yes, yes, yes);
        const bool low = least < (float)g.low - ROUNDED, high = most > (float)g.high + ROUNDED;
        if (TABLE || (low && high)) run(no, yes, yes);
        else if (low) run(no, yes, no);
        else if (high) run(no, no, yes);
        else run(no, no, no);
    }
    // A sum and a product more. Levels are small integers: their product is exact.
    static F add(F sum, F level, F v) { return EXACT ? fused(level, v, sum) : sum + level * v; }

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
            const float reach = std::fabs(g.targets[t]);
            F xq = none, qq = none;
            bounded(-reach, reach, [&](auto weights, auto least, auto most) {
                for (int j = 0; j < g.sub; ++j) {
                    const F v = load(x[j]), q = level<least, most>(v * by);
                    if constexpr (weights) {
                        const F wq = weighed(j, q);
                        xq = xq + wq * v;
                        qq = qq + wq * q;
                    } else {
                        xq = add(xq, q, v);
                        qq = fused(q, q, qq);
                    }
                }
            });
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
        auto attempt = [&](F offset, F by, float least, float most) {
            F sq = none, sqq = none, sxq = none;
            bounded(least, most, [&](auto weights, auto low, auto high) {
                for (int j = 0; j < g.sub; ++j) {
                    const F v = load(x[j]), q = level<low, high>((v - offset) * by);
                    if constexpr (weights) {
                        const F wq = weighed(j, q);
                        sq = sq + wq;
                        sqq = sqq + wq * q;
                        sxq = sxq + wq * v;
                    } else {
                        sq = sq + q;
                        sqq = fused(q, q, sqq);
                        sxq = add(sxq, q, v);
                    }
                }
            });
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
        for (int t = 0; t < g.n_targets; ++t) attempt(low, inverse * splat(g.targets[t]), 0.0f, g.targets[t]);
        const float far = __builtin_inff();
        attempt(m0, pick(above(s0, none), splat(1.0f) / s0, none), -far, far);
        scale = s0;
        minimum = none - m0;
    }

    // The value of a level, and what is rounded to one. Without a minimum: the same, and less to do.
    template <bool MINIMUM>
    static F value(F scale, F level, F minimum) { return MINIMUM ? scale * level - minimum : scale * level; }
    template <bool MINIMUM>
    static F scaled(F v, F inverse, F minimum) { return MINIMUM ? (v + minimum) * inverse : v * inverse; }

    // What is lost with these as they are stored.
    F loss(F scale, F minimum) const { return g.affine ? lost<true>(scale, minimum) : lost<false>(scale, minimum); }
    template <bool MINIMUM>
    F lost(F scale, F minimum) const {
        const F none = splat(0.0f);
        const F inverse = pick(differ(scale, none), splat(1.0f) / scale, none);
        F total = none;
        for (int j = 0; j < g.sub; ++j) {
            const F v = load(x[j]);
            const F e = v - value<MINIMUM>(scale, level(scaled<MINIMUM>(v, inverse, minimum)), minimum);
            total = total + weighed(j, e) * e;
        }
        return total;
    }

    // The codes; what is lost, and how much there was, is added to `lost` and `total`.
    void write(F scale, F minimum, uint8_t (*codes)[LANES], F& lost, F& total) const {
        if (g.affine) write<true>(scale, minimum, codes, lost, total);
        else write<false>(scale, minimum, codes, lost, total);
    }
    template <bool MINIMUM>
    void write(F scale, F minimum, uint8_t (*codes)[LANES], F& lost, F& total) const {
        const F none = splat(0.0f);
        const F inverse = pick(differ(scale, none), splat(1.0f) / scale, none);
        // Here, because for all that the compiler knows a code is written over the grid.
        const F least = splat((float)g.low), most = splat((float)g.high);
        const I first = splat((int)as_bits(MAGIC) + g.low);
        const float (*const from)[LANES] = x;
        const int size = g.sub;
        F e2 = none, n2 = none;
        for (int j = 0; j < size; ++j) {
            const F x0 = load(from[j]), v = scaled<MINIMUM>(x0, inverse, minimum);
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
                const F raised = clamp(v, least, most) + splat(MAGIC);
                q = raised - splat(MAGIC);
                store_u8(codes[j], bits_of(raised) - first);
            }
            const F e = x0 - value<MINIMUM>(scale, q, minimum);
            e2 = e2 + e * e;
            n2 = n2 + x0 * x0;
        }
        lost = lost + e2;
        total = total + n2;
    }
};

// What a block holds, before it is packed, a lane a row.
struct Fitted {
    uint16_t d[LANES], dmin[LANES];
    uint8_t (*codes)[LANES];
    uint8_t scales[2 * SUPER / 16][LANES];  // then the minima
    I outside = splat(0);                   // scales that left float16: the lowest bit of each lane
};

QK_INLINE F to_half(F x, uint16_t* kept, I& outside) {
    F16::store16(kept, x);
    outside = outside | greater(load_u16(kept) & splat(0x7fff), splat(0x7bff));
    return F16::load16(kept);
}
QK_INLINE void put(uint8_t* to, F whole) { store_u8(to, bits_of(whole + splat(MAGIC)) - splat((int)as_bits(MAGIC))); }

// A block whose scale is a number of its own: one sub-block.
template <class Sub>
void fit_alone(const Sub& block, Fitted& made, F& lost, F& total) {
    const QkGrid& g = block.g;
    const F none = splat(0.0f);
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
        store_u16(made.d, bits_of(chosen + splat(MAGIC)) - splat((int)as_bits(MAGIC)));
        scale = from_bits(bits_of((chosen - splat(1.0f)) + splat(MAGIC)) << 23);
    } else if (g.affine) {
        block.affine(true, scale, minimum);
        scale = to_half(scale, made.d, made.outside);
        minimum = none - to_half(none - minimum, made.dmin, made.outside);
    } else {
        if (g.n_targets) {
            scale = block.symmetric();
        } else {
            F low, high;
            block.range(low, high);
            scale = max(high, none - low) * splat((float)(1.0 / g.high));
        }
        scale = to_half(scale, made.d, made.outside);
    }
    block.write(scale, minimum, made.codes, lost, total);
}

// A super-block: the scales of its sub-blocks are integers times a float16.
template <class Sub>
void fit_super(const Sub& block, Fitted& made, F& lost, F& total) {
    const QkGrid& g = block.g;
    constexpr int MOST_SUBS = 16;
    const int subs = SUPER / g.sub;
    const F none = splat(0.0f), least = splat((float)g.least), most = splat((float)g.most), one = splat(1.0f);
    F scale[MOST_SUBS], minimum[MOST_SUBS];
    F low = none, high = none, deepest = none;
    auto part = [&](int k) { return Sub{g, block.x + k * g.sub, block.w ? block.w + k * g.sub : nullptr}; };
    for (int k = 0; k < subs; ++k) {
        minimum[k] = none;
        if (g.affine) part(k).affine(false, scale[k], minimum[k]);
        else scale[k] = part(k).symmetric();
        low = min(low, scale[k]), high = max(high, scale[k]), deepest = max(deepest, minimum[k]);
    }
    F d, dmin = none;
    if (g.affine) {
        d = to_half(high * splat((float)(1.0 / g.most)), made.d, made.outside);
        dmin = to_half(deepest * splat((float)(1.0 / g.most)), made.dmin, made.outside);
    } else {
        d = to_half(pick(above(none - low, high), low, high) * splat((float)(1.0 / g.least)), made.d, made.outside);
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
        put(made.scales[k], sc);
        if (g.affine) put(made.scales[subs + k], mn);
        part(k).write(d * sc, dmin * mn, made.codes + k * g.sub, lost, total);
    }
}

}  // namespace
