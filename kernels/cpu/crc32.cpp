// CRC-32 as zlib has it, by carry-less products: "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ" (Intel, 2009).
// Four registers hold what the bytes so far are congruent to; each step moves them on by 64 bytes.
#include <cstring>

#include "qkit_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// A bit at a time: for the few bytes at the end.
uint32_t slowly(uint32_t crc, const uint8_t* data, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        crc ^= data[i];
        for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
    }
    return crc;
}

#if defined(__x86_64__)
#define QK_FOLDS __attribute__((target("pclmul,sse4.1")))

QK_FOLDS inline __m128i moved(__m128i x, __m128i by, __m128i onto) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), onto);
}
QK_FOLDS inline __m128i bytes(const uint8_t* data) { return _mm_loadu_si128((const __m128i*)data); }

// n is a multiple of 64, and not 0.
QK_FOLDS uint32_t folded(uint32_t crc, const uint8_t* data, int64_t n) {
    const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i x[4];
    for (int k = 0; k < 4; ++k) x[k] = bytes(data + 16 * k);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (int64_t i = 64; i < n; i += 64)
        for (int k = 0; k < 4; ++k) x[k] = moved(x[k], by_64, bytes(data + i + 16 * k));
    for (int k = 1; k < 4; ++k) x[k] = moved(x[k - 1], by_16, x[k]);
    uint8_t rest[16];
    std::memcpy(rest, &x[3], sizeof rest);
    return slowly(0, rest, sizeof rest);
}

bool folds() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }
#else
uint32_t folded(uint32_t crc, const uint8_t* data, int64_t n) { return slowly(crc, data, n); }
bool folds() { return false; }
#endif

}  // namespace

int qk_crc32(const uint8_t* data, int64_t n, uint32_t* crc) {
    if (n < 0) return QK_BAD_SHAPE;
    if (!crc || (n && !data)) return QK_NULL;
    if (!folds()) return QK_BAD_ISA;
    const int64_t most = n / 64 * 64;
    *crc = ~slowly(most ? folded(~0u, data, most) : ~0u, data + most, n - most);
    return QK_OK;
}
