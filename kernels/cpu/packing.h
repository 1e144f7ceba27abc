// Packing, unpacking and dequantizing one row. On a little-endian machine the packed words are a byte string: at
// 8 bits the codes themselves, at 4 bits two codes a byte, low nibble first.
#pragma once
#include "lanes.h"
#include "quantize.h"
#include "qkit_cpu.h"
#include "rows.h"

namespace {

// Pairs of codes are handled as 16-bit units, which every compiler vectorizes without shuffles.
__attribute__((noinline)) void nibbles_to_codes(const uint8_t* bytes, uint8_t* codes, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
        const uint16_t b = bytes[i];
        const uint16_t pair = (uint16_t)((b & 0x0fu) | ((b & 0xf0u) << 4));
        std::memcpy(codes + 2 * i, &pair, 2);
    }
}

int pack(const uint8_t* codes, uint32_t* packed, int64_t n, int bits) {
    const int64_t bytes = (n * bits + 31) / 32 * 4;
    uint8_t* to = (uint8_t*)packed;
    if (bits == 8) {
        std::memcpy(to, codes, (size_t)n);
        std::memset(to + n, 0, (size_t)(bytes - n));
        return QK_OK;
    }
    const int64_t pairs = n / 2;
    uint16_t seen = 0;
    for (int64_t i = 0; i < pairs; ++i) {
        uint16_t pair;
        std::memcpy(&pair, codes + 2 * i, 2);
        seen = (uint16_t)(seen | pair);
        to[i] = (uint8_t)(pair | (pair >> 4));
    }
    std::memset(to + pairs, 0, (size_t)(bytes - pairs));
    if (n & 1) {
        seen = (uint16_t)(seen | codes[n - 1]);
        to[pairs] = (uint8_t)(codes[n - 1] & 0x0fu);
    }
    return (seen & 0xf0f0u) ? QK_CODE_RANGE : QK_OK;
}

void unpack(const uint32_t* packed, uint8_t* codes, int64_t n, int bits) {
    const uint8_t* from = (const uint8_t*)packed;
    if (bits == 8) {
        std::memcpy(codes, from, (size_t)n);
        return;
    }
    nibbles_to_codes(from, codes, n / 2);
    if (n & 1) codes[n - 1] = from[n / 2] & 0x0fu;
}

template <class O>
__attribute__((noinline)) void dequantize_codes(const uint8_t* codes, typename O::T* out, int64_t n, int z, float s) {
    if (!finite(s)) {  // a damaged file; NaN and infinity round by rules of their own
        for (int64_t i = 0; i < n; ++i) out[i] = O::put((float)(codes[i] - z) * s);
        return;
    }
    const I vz = splat(z);
    const F vs = splat(s);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) O::store16(out + i, to_float(load_u8(codes + i) - vz) * vs);
    for (; i < n; ++i) out[i] = O::put((float)(codes[i] - z) * s);
}

template <class O>
void dequantize_row(const qkit::DequantizeArgs& a, const uint8_t* packed, const void* scale, const uint8_t* zero,
                    typename O::T* out) {
    constexpr int64_t BLOCK = 256;
    const int64_t size = a.cols / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        const float s = get_scale(scale, g, a.scale_dtype);
        const int z = zero ? zero[g] : 1 << (a.bits - 1);
        // A group begins on a byte: the driver refuses several groups of an odd size.
        const uint8_t* from = packed + g * size * a.bits / 8;
        typename O::T* to = out + g * size;
        if (a.bits == 8) {
            dequantize_codes<O>(from, to, size, z, s);
            continue;
        }
        for (int64_t i = 0; i < size; i += BLOCK) {
            uint8_t codes[BLOCK];
            const int64_t n = size - i < BLOCK ? size - i : BLOCK;
            nibbles_to_codes(from + i / 2, codes, n / 2);
            if (n & 1) codes[n - 1] = from[(i + n) / 2] & 0x0fu;
            dequantize_codes<O>(codes, to + i, n, z, s);
        }
    }
}

void dequantize(const qkit::DequantizeArgs& a, const uint32_t* packed, const void* scale, const uint8_t* zero,
                void* out) {
    const uint8_t* from = (const uint8_t*)packed;
    switch (a.out_dtype) {
        case QK_F32: return dequantize_row<F32>(a, from, scale, zero, (float*)out);
        case QK_F16: return dequantize_row<F16>(a, from, scale, zero, (uint16_t*)out);
        default: return dequantize_row<BF16>(a, from, scale, zero, (uint16_t*)out);
    }
}

}  // namespace
