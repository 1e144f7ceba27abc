// Round to nearest on a per-group grid, one row at a time. The grid (the same as reference.grid in Python):
//   symmetric   scale = (the weight of largest magnitude, signed; the positive one on a tie) / -(2**(bits-1)), so
//               that this weight has a code of its own, 0; zero = 2**(bits-1)
//   asymmetric  lo = min(0, w), hi = max(0, w); scale = max((hi - lo) / max_code, hi / (max_code - min_zero));
//               zero = round(-lo / scale), clamped to min_zero .. max_code
// The scale is rounded to its stored type before the codes are chosen. A scale that is then zero (or, in bfloat16
// and float32, subnormal: engines flush those) is replaced by 1: every code of such a group is its zero point.
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

// Adding it to |x| < 2**22 rounds x to an integer, ties to even, held in the low bits of the sum.
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2**23

QK_INLINE float nearest(float x) {
    volatile float r = x + MAGIC;  // volatile: x87 or a reassociating compiler must not see through it
    return r - MAGIC;
}

// The i-th sixteen values of a group of n, zero padded: zeros change neither the range nor the sums.
template <class W>
QK_INLINE F load_padded(const typename W::T* x, int64_t i, int64_t n) {
    if (i + LANES <= n) return W::load16(x + i);
    typename W::T tail[LANES] = {};
    std::memcpy(tail, x + i, (size_t)(n - i) * sizeof(tail[0]));
    return W::load16(tail);
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
        float low[LANES], high[LANES], lo = 0.0f, hi = 0.0f;
        int32_t any[LANES], non_finite = 0;
        store(low, lows);
        store(high, highs);
        std::memcpy(any, &bad, sizeof any);
        for (int i = 0; i < LANES; ++i) {
            lo = low[i] < lo ? low[i] : lo;
            hi = high[i] > hi ? high[i] : hi;
            non_finite |= any[i];
        }
        if (non_finite) return QK_NON_FINITE;

        float s;
        if (a.symmetric) {
            s = (hi >= -lo ? hi : lo) / (float)-mid;
        } else {
            const float full = (hi - lo) / (float)max_code, above = hi / (float)(max_code - a.min_zero);
            s = above > full ? above : full;
        }
        s = round_scale(s, a.scale_dtype);
        if (!finite(s)) return QK_SCALE_OVERFLOW;
        if (magnitude(s) < least_scale(a.scale_dtype)) s = 1.0f;
        put_scale(scale, g, a.scale_dtype, s);

        int z = mid;
        if (!a.symmetric) {
            const float exact = -lo / s;  // at most max_code * (1 + 2**-8), or less than 1 where s is 1
            z = (int)nearest(exact < (float)max_code ? exact : (float)max_code);
            z = z < a.min_zero ? a.min_zero : z;
            zero[g] = (uint8_t)z;
        }

        const F vs = splat(s), least = splat((float)-z), most = splat((float)(max_code - z)), magic = splat(MAGIC);
        const I offset = splat(z - (int)as_bits(MAGIC));
        const double s2 = (double)s * (double)s;
        uint8_t* to = codes + g * size;
        for (int64_t i = 0; i < size;) {
            // Errors are summed in units of the scale, where float32 neither overflows nor underflows, and moved to
            // double often enough (16 values a lane) that nothing is lost.
            F e2 = splat(0.0f), n2 = splat(0.0f);
            for (const int64_t end = i + 16 * LANES < size ? i + 16 * LANES : size; i < end; i += LANES) {
                const F t = load_padded<W>(x, i, size) / vs;
                const F rounded = min(max(t, least), most) + magic;
                const I code = bits_of(rounded) + offset;
                const F e = t - (rounded - magic);
                e2 = e2 + e * e;
                n2 = n2 + t * t;
                if (i + LANES <= size) {
                    store_u8(to + i, code);
                } else {
                    uint8_t tail[LANES];
                    store_u8(tail, code);
                    std::memcpy(to + i, tail, (size_t)(size - i));
                }
            }
            float ef[LANES], nf[LANES];
            store(ef, e2);
            store(nf, n2);
            for (int k = 0; k < LANES; ++k) error[k] += (double)ef[k] * s2;
            for (int k = 0; k < LANES; ++k) norm[k] += (double)nf[k] * s2;
        }
    }
    stats[0] = stats[1] = 0.0;
    for (int k = 0; k < LANES; ++k) stats[0] += error[k];
    for (int k = 0; k < LANES; ++k) stats[1] += norm[k];
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
