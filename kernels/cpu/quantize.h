// Round to nearest on a per-group grid, one row at a time. The grid (the same as reference.grid in Python):
//   symmetric   scale = (the weight of largest magnitude, signed; the positive one on a tie) / -(2**(bits-1)), so
//               that this weight has a code of its own, 0; zero = 2**(bits-1)
//   asymmetric  lo = min(0, w), hi = max(0, w); scale = max((hi - lo) / max_code, hi / (max_code - min_zero));
//               zero = round(-lo / scale), clamped to min_zero .. max_code
// The scale is rounded to its stored type before the codes are chosen. A scale that is then zero (or, in bfloat16
// and float32, subnormal: engines flush those) is replaced by 1: every code of such a group is its zero point.
// With candidates, each group takes the multiple of the scale that leaves the least squared error (clip search).
#pragma once
#include "lanes.h"
#include "qkit_cpu.h"
#include "rows.h"

namespace {

QK_INLINE float magnitude(float x) { return as_float(as_bits(x) & 0x7fffffffu); }
QK_INLINE bool finite(float x) { return (as_bits(x) & 0x7fffffffu) < 0x7f800000u; }

// `scale` as stored. float16 goes through bfloat16 first: engines read the scales in the model's own dtype.
QK_INLINE float round_scale(float scale, int dtype) {
    if (dtype == QK_F32) return scale;
    const float b = as_float((uint32_t)to_bf16(scale) << 16);
    return dtype == QK_BF16 ? b : from_f16(to_f16(b));
}
QK_INLINE void put_scale(void* scale, int64_t i, int dtype, float x) {
    if (dtype == QK_F32) ((float*)scale)[i] = x;
    else ((uint16_t*)scale)[i] = dtype == QK_BF16 ? to_bf16(x) : to_f16(x);
}
QK_INLINE float get_scale(const void* scale, int64_t i, int dtype) {
    if (dtype == QK_F32) return ((const float*)scale)[i];
    const uint16_t h = ((const uint16_t*)scale)[i];
    return dtype == QK_BF16 ? as_float((uint32_t)h << 16) : from_f16(h);
}
QK_INLINE float least_scale(int dtype) { return dtype == QK_F16 ? 0x1p-24f : 0x1p-126f; }

QK_INLINE float nearest(float x) {
    volatile float r = x + MAGIC;  // volatile: x87 or a reassociating compiler must not see through it
    return r - MAGIC;
}

// What a group loses on the grid (s, z), added to error[lane] and norm[lane]. WRITE: also stores its codes.
// Errors are summed in units of the scale, where float32 neither overflows nor underflows, and moved to double often
// enough (16 values a lane) that nothing is lost. reference.squared_error adds in the same order.
template <class W, bool WRITE>
QK_INLINE void measure(const typename W::T* x, int64_t size, float s, int z, int max_code, double* error, double* norm,
                       uint8_t* codes) {
    const F vs = splat(s), least = splat((float)-z), most = splat((float)(max_code - z)), magic = splat(MAGIC);
    const I offset = splat(z - (int)as_bits(MAGIC));
    const double s2 = (double)s * (double)s;
    for (int64_t i = 0; i < size;) {
        F e2 = splat(0.0f), n2 = splat(0.0f);
        for (const int64_t end = i + 16 * LANES < size ? i + 16 * LANES : size; i < end; i += LANES) {
            const F t = load_padded<W>(x, i, size) / vs;
            const F rounded = min(max(t, least), most) + magic;
            const F e = t - (rounded - magic);
            e2 = e2 + e * e;
            if (!WRITE) continue;
            n2 = n2 + t * t;
            const I code = bits_of(rounded) + offset;
            if (i + LANES <= size) {
                store_u8(codes + i, code);
            } else {
                uint8_t tail[LANES];
                store_u8(tail, code);
                std::memcpy(codes + i, tail, (size_t)(size - i));
            }
        }
        float lanes[LANES];
        store(lanes, e2);
        for (int k = 0; k < LANES; ++k) error[k] += (double)lanes[k] * s2;
        if (!WRITE) continue;
        store(lanes, n2);
        for (int k = 0; k < LANES; ++k) norm[k] += (double)lanes[k] * s2;
    }
}

QK_INLINE double sum(const double* lanes) {
    double total = 0.0;
    for (int k = 0; k < LANES; ++k) total += lanes[k];
    return total;
}

QK_INLINE float stored_scale(float exact, int dtype) {
    const float s = round_scale(exact, dtype);
    return magnitude(s) < least_scale(dtype) ? 1.0f : s;
}

QK_INLINE int zero_point(float lo, float s, int max_code, int min_zero) {
    const float exact = -lo / s, most = (float)max_code, least = (float)min_zero;
    return (int)nearest(exact > most ? most : exact < least ? least : exact);
}

template <class W>
int quantize_row(const qkit::QuantizeArgs& a, const typename W::T* w, uint8_t* codes, void* scale, uint8_t* zero,
                 double* stats) {
    const int64_t size = a.cols / a.groups;
    const int max_code = (1 << a.bits) - 1, mid = 1 << (a.bits - 1);
    double error[LANES] = {}, norm[LANES] = {};

    for (int64_t g = 0; g < a.groups; ++g) {
        const typename W::T* x = w + g * size;
        F lows = splat(0.0f), highs = splat(0.0f);
        I bad = splat(0);
        for (int64_t i = 0; i < size; i += LANES) {
            const F v = load_padded<W>(x, i, size);
            lows = min(v, lows);
            highs = max(v, highs);
            bad = bad | greater(bits_of(v) & splat(0x7fffffff), splat(0x7f7fffff));
        }
        float low[LANES], high[LANES];
        int32_t any[LANES];
        store(low, lows);
        store(high, highs);
        std::memcpy(any, &bad, sizeof any);
        for (int half = LANES / 2; half; half /= 2)  // a tree: four steps instead of a chain of sixteen
            for (int i = 0; i < half; ++i) {
                low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
                high[i] = high[i + half] > high[i] ? high[i + half] : high[i];
                any[i] |= any[i + half];
            }
        const float lo = low[0], hi = high[0];
        if (any[0]) return QK_NON_FINITE;

        float exact;
        if (a.symmetric) {
            exact = (hi >= -lo ? hi : lo) / (float)-mid;
        } else {
            const float full = (hi - lo) / (float)max_code, above = hi / (float)(max_code - a.min_zero);
            exact = above > full ? above : full;
        }
        float s = stored_scale(exact, a.scale_dtype);
        if (!finite(s)) return QK_SCALE_OVERFLOW;
        int z = a.symmetric ? mid : zero_point(lo, s, max_code, a.min_zero);

        if (a.candidates) {
            double best = 0.0;
            for (int c = -1; c < a.candidates; ++c) {  // -1: the spanning grid, which only a better one replaces
                const float cs = c < 0 ? s : stored_scale(exact * a.multipliers[c], a.scale_dtype);
                if (!finite(cs)) continue;
                const int cz = a.symmetric ? mid : zero_point(lo, cs, max_code, a.min_zero);
                double lanes[LANES] = {};
                measure<W, false>(x, size, cs, cz, max_code, lanes, nullptr, nullptr);
                const double left = sum(lanes);
                if (c >= 0 && !(left < best)) continue;
                best = left;
                s = cs;
                z = cz;
            }
        }
        put_scale(scale, g, a.scale_dtype, s);
        if (!a.symmetric) zero[g] = (uint8_t)z;
        measure<W, true>(x, size, s, z, max_code, error, norm, codes + g * size);
    }
    stats[0] = sum(error);
    stats[1] = sum(norm);
    return QK_OK;
}

int quantize(const qkit::QuantizeArgs& a, const void* w, uint8_t* codes, void* scale, uint8_t* zero, double* stats) {
    switch (a.w_dtype) {
        case QK_F32: return quantize_row<F32>(a, (const float*)w, codes, scale, zero, stats);
        case QK_F16: return quantize_row<F16>(a, (const uint16_t*)w, codes, scale, zero, stats);
        default: return quantize_row<BF16>(a, (const uint16_t*)w, codes, scale, zero, stats);
    }
}

}  // namespace
