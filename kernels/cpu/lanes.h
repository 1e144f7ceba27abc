// Sixteen float or int lanes, on the compiler's vector extensions. The lane count is the same on every ISA, only the
// register width differs: every kernel is written once, and sums come out bit-identical everywhere.
//
// Included by one file per ISA, each with its own flags; the anonymous namespace keeps the copies apart (an inline
// function merged by the linker could otherwise bring AVX-512 code into the scalar path).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed layout is little-endian"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;  // SSE2 or NEON: the baseline of the platform
#endif
constexpr int LANES = 16;
constexpr int WIDTH = REGISTER_BYTES / 4;  // lanes in a register
constexpr int PARTS = LANES / WIDTH;       // registers in a vector

typedef float RawF __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t RawI __attribute__((vector_size(REGISTER_BYTES)));

struct F {
    RawF v[PARTS];
};
struct I {
    RawI v[PARTS];
};

#define QK_EACH for (int p = 0; p < PARTS; ++p)
#define QK_INLINED __attribute__((always_inline))
#define QK_INLINE static inline QK_INLINED

QK_INLINE F splat(float x) {
    F r;
    QK_EACH r.v[p] = x - RawF{};
    return r;
}
QK_INLINE I splat(int32_t x) {
    I r;
    QK_EACH r.v[p] = x - RawI{};
    return r;
}
// Register by register: GCC copies a whole vector of several registers through the stack.
QK_INLINE F load(const float* x) {
    F r;
    QK_EACH std::memcpy(&r.v[p], x + p * WIDTH, REGISTER_BYTES);
    return r;
}
QK_INLINE I load(const uint32_t* x) {
    I r;
    QK_EACH std::memcpy(&r.v[p], x + p * WIDTH, REGISTER_BYTES);
    return r;
}
QK_INLINE void store(float* to, F x) { QK_EACH std::memcpy(to + p * WIDTH, &x.v[p], REGISTER_BYTES); }
QK_INLINE void store(uint32_t* to, I x) { QK_EACH std::memcpy(to + p * WIDTH, &x.v[p], REGISTER_BYTES); }

// Asks for what lies AHEAD behind `at`, before `end`. Processors by themselves reach two thirds to four fifths of the speed
// of memory where there is some arithmetic between the loads; the distance is that of benchmarks/cpu_matmul.py's best. What
// is read once passes the other caches by.
constexpr int64_t AHEAD = 8192;
QK_INLINE void fetch_ahead(const void* at, const void* end) {
    const char* later = (const char*)at + AHEAD;
    __builtin_prefetch(later < (const char*)end ? later : (const char*)at, 0, 0);
}

QK_INLINE F operator+(F a, F b) { QK_EACH a.v[p] += b.v[p]; return a; }
QK_INLINE F operator-(F a, F b) { QK_EACH a.v[p] -= b.v[p]; return a; }
QK_INLINE F operator*(F a, F b) { QK_EACH a.v[p] *= b.v[p]; return a; }
QK_INLINE F operator/(F a, F b) { QK_EACH a.v[p] /= b.v[p]; return a; }
QK_INLINE I operator+(I a, I b) { QK_EACH a.v[p] += b.v[p]; return a; }
QK_INLINE I operator-(I a, I b) { QK_EACH a.v[p] -= b.v[p]; return a; }
QK_INLINE I operator&(I a, I b) { QK_EACH a.v[p] &= b.v[p]; return a; }
QK_INLINE I operator|(I a, I b) { QK_EACH a.v[p] |= b.v[p]; return a; }
QK_INLINE I without(I a, I b) { QK_EACH a.v[p] &= ~b.v[p]; return a; }
QK_INLINE I operator<<(I a, int n) { QK_EACH a.v[p] <<= n; return a; }
QK_INLINE I operator>>(I a, int n) { QK_EACH a.v[p] >>= n; return a; }
QK_INLINE F min(F a, F b) { QK_EACH a.v[p] = a.v[p] < b.v[p] ? a.v[p] : b.v[p]; return a; }
QK_INLINE F max(F a, F b) { QK_EACH a.v[p] = a.v[p] > b.v[p] ? a.v[p] : b.v[p]; return a; }
QK_INLINE I max(I a, I b) { QK_EACH a.v[p] = a.v[p] > b.v[p] ? a.v[p] : b.v[p]; return a; }
// All ones where a > b.
QK_INLINE I greater(I a, I b) { QK_EACH a.v[p] = (RawI)(a.v[p] > b.v[p]); return a; }

QK_INLINE I bits_of(F x) { I r; QK_EACH r.v[p] = (RawI)x.v[p]; return r; }
QK_INLINE F from_bits(I x) { F r; QK_EACH r.v[p] = (RawF)x.v[p]; return r; }
QK_INLINE F to_float(I x) { F r; QK_EACH r.v[p] = __builtin_convertvector(x.v[p], RawF); return r; }

// a * b + c, fused where the ISA has it: only for results that need not agree bit for bit across ISAs.
QK_INLINE F fused(F a, F b, F c) {
#if defined(__AVX512F__)
    QK_EACH c.v[p] = (RawF)_mm512_fmadd_ps((__m512)a.v[p], (__m512)b.v[p], (__m512)c.v[p]);
#elif defined(__FMA__)
    QK_EACH c.v[p] = (RawF)_mm256_fmadd_ps((__m256)a.v[p], (__m256)b.v[p], (__m256)c.v[p]);
#elif defined(__aarch64__)
    QK_EACH c.v[p] = (RawF)vfmaq_f32((float32x4_t)c.v[p], (float32x4_t)a.v[p], (float32x4_t)b.v[p]);
#else
    QK_EACH c.v[p] += a.v[p] * b.v[p];
#endif
    return c;
}

// Over the lanes, half by half; `largest` as `>` has it.
template <class T, class V>
QK_INLINE T halved(V x, T (*both)(T, T)) {
    T each[LANES];
    std::memcpy(each, &x, sizeof each);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) each[i] = both(each[i], each[i + half]);
    return each[0];
}
QK_INLINE float largest(F x) { return halved<float>(x, [](float a, float b) { return b > a ? b : a; }); }
#if defined(__AVX512F__)
QK_INLINE float total(F x) { return _mm512_reduce_add_ps((__m512)x.v[0]); }
QK_INLINE int32_t total(I x) { return _mm512_reduce_add_epi32((__m512i)x.v[0]); }
QK_INLINE int32_t largest(I x) { return _mm512_reduce_max_epi32((__m512i)x.v[0]); }
#else
QK_INLINE float total(F x) { return halved<float>(x, [](float a, float b) { return a + b; }); }
QK_INLINE int32_t total(I x) { return halved<int32_t>(x, [](int32_t a, int32_t b) { return a + b; }); }
QK_INLINE int32_t largest(I x) { return halved<int32_t>(x, [](int32_t a, int32_t b) { return b > a ? b : a; }); }
#endif

#if defined(QKIT_EMULATE_AVXVNNI) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define QK_VNNI_256
#endif
// AVX-VNNI's instruction, or, for tests on machines that lack it, what it computes.
#if defined(QKIT_EMULATE_AVXVNNI)
QK_INLINE __m256i dpbusd(__m256i acc, __m256i u, __m256i s) {
    int32_t sum[8];
    uint8_t a[32];
    int8_t b[32];
    std::memcpy(sum, &acc, 32);
    std::memcpy(a, &u, 32);
    std::memcpy(b, &s, 32);
    for (int i = 0; i < 32; ++i) sum[i / 4] += a[i] * b[i];
    return _mm256_loadu_si256((const __m256i*)sum);
}
#elif defined(QK_VNNI_256)
QK_INLINE __m256i dpbusd(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
#endif

// acc + the sum over a lane's four bytes of u * s, u unsigned, s signed; u is at most 15 where BITS is 4. Exact.
template <int BITS>
QK_INLINE I dot4(I acc, I u, I s) {
#if defined(__AVX512VNNI__)
    acc.v[0] = (RawI)_mm512_dpbusd_epi32((__m512i)acc.v[0], (__m512i)u.v[0], (__m512i)s.v[0]);
#elif defined(QK_VNNI_256)
    QK_EACH acc.v[p] = (RawI)dpbusd((__m256i)acc.v[p], (__m256i)u.v[p], (__m256i)s.v[p]);
#elif defined(__SSE2__) && !defined(__AVX2__)
    QK_EACH {  // even and odd bytes as 16 bits
        const __m128i a = (__m128i)u.v[p], b = (__m128i)s.v[p];
        const __m128i even = _mm_madd_epi16(_mm_and_si128(a, _mm_set1_epi16(255)), _mm_srai_epi16(_mm_slli_epi16(b, 8), 8));
        const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(a, 8), _mm_srai_epi16(b, 8));
        acc.v[p] += (RawI)even + (RawI)odd;
    }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    QK_EACH acc.v[p] = (RawI)vusdotq_s32((int32x4_t)acc.v[p], (uint8x16_t)u.v[p], (int8x16_t)s.v[p]);
#else
    if constexpr (BITS == 8) {  // what follows holds only small unsigned bytes: one nibble at a time
        const I low = splat(0x0f0f0f0f), none = splat(0);
        return dot4<4>(acc, u & low, s) + (dot4<4>(none, (u >> 4) & low, s) << 4);
    }
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)u.v[0], (__m512i)s.v[0]);
    acc.v[0] += (RawI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    QK_EACH {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)u.v[p], (__m256i)s.v[p]);
        acc.v[p] += (RawI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    QK_EACH acc.v[p] = (RawI)vdotq_s32((int32x4_t)acc.v[p], (int8x16_t)u.v[p], (int8x16_t)s.v[p]);
#elif defined(__aarch64__)
    QK_EACH {  // two products of at most 15 * 128 fit 16 bits
        const int8x16_t a = (int8x16_t)u.v[p], b = (int8x16_t)s.v[p];
        const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
        acc.v[p] = (RawI)vpadalq_s16((int32x4_t)acc.v[p], pairs);
    }
#else
    for (int k = 0; k < 4; ++k) QK_EACH {
        acc.v[p] += ((u.v[p] >> (8 * k)) & 255) * ((s.v[p] << (24 - 8 * k)) >> 24);
    }
#endif
#endif
    return acc;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The two halves of each lane shifted right, zeros coming in.
QK_INLINE I shift_halves(I x, int n) {
    QK_EACH x.v[p] = (RawI)_mm256_srli_epi16((__m256i)x.v[p], n);
    return x;
}
// acc + the sum over a lane's two halves of a * b, all signed.
QK_INLINE I dot2(I acc, I a, I b) {
#if defined(QK_VNNI_256) && !defined(QKIT_EMULATE_AVXVNNI)
    QK_EACH acc.v[p] = (RawI)_mm256_dpwssd_avx_epi32((__m256i)acc.v[p], (__m256i)a.v[p], (__m256i)b.v[p]);
#else
    QK_EACH acc.v[p] += (RawI)_mm256_madd_epi16((__m256i)a.v[p], (__m256i)b.v[p]);
#endif
    return acc;
}
#endif

// Widening and narrowing are spelled out: GCC 12 takes __builtin_convertvector between 8- and 32-bit lanes apart
// into scalars. Narrowing keeps the low bits.
QK_INLINE I load_u16(const uint16_t* x) {
    I r;
#if defined(__AVX512F__)
    r.v[0] = (RawI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
    QK_EACH r.v[p] = (RawI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(x + p * WIDTH)));
#elif defined(__SSE2__)
    QK_EACH {
        const __m128i four = _mm_loadl_epi64((const __m128i*)(x + p * WIDTH));
        r.v[p] = (RawI)_mm_unpacklo_epi16(four, _mm_setzero_si128());
    }
#elif defined(__aarch64__)
    QK_EACH r.v[p] = (RawI)vmovl_u16(vld1_u16(x + p * WIDTH));
#else
    int32_t wide[LANES];
    for (int i = 0; i < LANES; ++i) wide[i] = x[i];
    std::memcpy(&r, wide, sizeof r);
#endif
    return r;
}
QK_INLINE I load_u8(const uint8_t* x) {
    I r;
#if defined(__AVX512F__)
    r.v[0] = (RawI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#elif defined(__AVX2__)
    QK_EACH r.v[p] = (RawI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(x + p * WIDTH)));
#elif defined(__aarch64__)
    const uint8x16_t bytes = vld1q_u8(x);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    r.v[0] = (RawI)vmovl_u16(vget_low_u16(low));
    r.v[1] = (RawI)vmovl_high_u16(low);
    r.v[2] = (RawI)vmovl_u16(vget_low_u16(high));
    r.v[3] = (RawI)vmovl_high_u16(high);
#else
    int32_t wide[LANES];
    for (int i = 0; i < LANES; ++i) wide[i] = x[i];
    std::memcpy(&r, wide, sizeof r);
#endif
    return r;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// The sixteen low halves, in order. Packing saturates, so the upper halves go first.
QK_INLINE __m256i halves(I x) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i a = _mm256_and_si256((__m256i)x.v[0], low), b = _mm256_and_si256((__m256i)x.v[1], low);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}
#endif
QK_INLINE void store_u16(uint16_t* to, I x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)x.v[0]));
#elif defined(__AVX2__)
    _mm256_storeu_si256((__m256i*)to, halves(x));
#elif defined(__aarch64__)
    QK_EACH vst1_u16(to + p * WIDTH, vmovn_u32((uint32x4_t)x.v[p]));
#else
    int32_t wide[LANES];
    std::memcpy(wide, &x, sizeof x);
    for (int i = 0; i < LANES; ++i) to[i] = (uint16_t)wide[i];
#endif
}
QK_INLINE void store_u8(uint8_t* to, I x) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x.v[0]));
#elif defined(__AVX2__)
    const __m256i h = _mm256_and_si256(halves(x), _mm256_set1_epi16(0xff));
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
#elif defined(__aarch64__)
    uint16_t half[LANES];
    store_u16(half, x);
    vst1q_u8(to, vcombine_u8(vmovn_u16(vld1q_u16(half)), vmovn_u16(vld1q_u16(half + 8))));
#else
    int32_t wide[LANES];
    std::memcpy(wide, &x, sizeof x);
    for (int i = 0; i < LANES; ++i) to[i] = (uint8_t)wide[i];
#endif
}

// ---- one value: bfloat16 and float16 to and from float32, ties to even -------------------------------------------

QK_INLINE uint32_t as_bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}
QK_INLINE float as_float(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}
QK_INLINE uint16_t to_bf16(float x) {
    const uint32_t b = as_bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
    return (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
QK_INLINE uint16_t to_f16(float x) {
    const uint32_t b = as_bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);   // NaN
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to 65536 or more: infinity
    if (a >= 0x38800000u)                                     // normal: rebias the exponent, drop 13 bits
        return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
    if (a < 0x33000000u) return (uint16_t)sign;  // below half the least subnormal
    // Subnormal: the multiple of 2**-24 nearest to it. The shift is 14 .. 24.
    const uint32_t shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u;
    const uint32_t kept = m >> shift, rest = m & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return (uint16_t)(sign | (kept + ((rest > half || (rest == half && (kept & 1u))) ? 1u : 0u)));
}
QK_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31u) return as_float(sign | 0x7f800000u | (m << 13));
    if (e) return as_float(sign | ((e + 112u) << 23) | (m << 13));
    const float subnormal = (float)m * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

#if !defined(__F16C__) && !defined(__aarch64__)
__attribute__((noinline)) void each_from_f16(const uint16_t* x, float* to) {
    for (int i = 0; i < LANES; ++i) to[i] = from_f16(x[i]);
}
__attribute__((noinline)) void each_to_f16(const float* x, uint16_t* to) {
    for (int i = 0; i < LANES; ++i) to[i] = to_f16(x[i]);
}
#endif

// ---- sixteen values of a dtype -----------------------------------------------------------------------------------

struct F32 {
    typedef float T;
    QK_INLINE F load16(const T* x) { return load(x); }
    QK_INLINE void store16(T* to, F x) { store(to, x); }
    QK_INLINE float get(const T* x) { return *x; }
    QK_INLINE T put(float x) { return x; }
};
struct BF16 {
    typedef uint16_t T;
    QK_INLINE F load16(const T* x) { return from_bits(load_u16(x) << 16); }
    // In the low halves; the shift is arithmetic, so that the upper ones are copies of the sign.
    QK_INLINE I bits(F x) {
        const I b = bits_of(x), nan = greater(b & splat(0x7fffffff), splat(0x7f800000));
        const I rounded = (b + splat(0x7fff) + ((b >> 16) & splat(1))) >> 16;
        return without(rounded, nan) | (splat(0x7fc0) & nan);
    }
    QK_INLINE void store16(T* to, F x) { store_u16(to, bits(x)); }
    QK_INLINE float get(const T* x) { return as_float((uint32_t)*x << 16); }
    QK_INLINE T put(float x) { return to_bf16(x); }
};
struct F16 {
    typedef uint16_t T;
    QK_INLINE F load16(const T* x) {
        F r;
#if defined(__AVX512F__)
        r.v[0] = (RawF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
        QK_EACH r.v[p] = (RawF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + p * WIDTH)));
#elif defined(__aarch64__)
        QK_EACH r.v[p] = (RawF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + p * WIDTH)));
#else
        float f[LANES];
        each_from_f16(x, f);
        r = load(f);
#endif
        return r;
    }
    QK_INLINE void store16(T* to, F x) {
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x.v[0], 0));
#elif defined(__AVX2__)
        QK_EACH _mm_storeu_si128((__m128i*)(to + p * WIDTH), _mm256_cvtps_ph((__m256)x.v[p], 0));
#elif defined(__aarch64__)
        QK_EACH vst1_u16(to + p * WIDTH, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.v[p])));
#else
        float f[LANES];
        store(f, x);
        each_to_f16(f, to);
#endif
    }
    QK_INLINE float get(const T* x) { return from_f16(*x); }
    QK_INLINE T put(float x) { return to_f16(x); }
};

// Adding it to |x| < 2**22 rounds x to an integer, ties to even, held in the low bits of the sum.
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2**23

// Values i .. i + 15 of n, zero padded.
template <class W>
QK_INLINE F load_padded(const typename W::T* x, int64_t i, int64_t n) {
    typename W::T tail[LANES];
    const typename W::T* from = x + i;
    if (i + LANES > n) {
        std::memset(tail, 0, sizeof tail);
        std::memcpy(tail, from, (size_t)(n - i) * sizeof(tail[0]));
        from = tail;
    }
    return W::load16(from);
}

}  // namespace
