// The tile instructions that amx.cpp uses. With QKIT_EMULATE they are computed in plain C, as Intel's manual (volume 2:
// LDTILECFG, TILELOADD, TDPBSUD, TILESTORED) defines them, and what would fault aborts.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(QKIT_EMULATE)
#include <immintrin.h>
#endif

namespace {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");

#if defined(QKIT_EMULATE)

struct Tiles {
    TileConfig config;
    uint8_t data[8][16][64];
};
thread_local Tiles tiles;

inline void require(bool condition) {
    if (!condition) std::abort();
}
inline void configure(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0);
    for (int t = 0; t < 16; ++t) require(t < 8 ? config.rows[t] <= 16 && config.row_bytes[t] <= 64 : !config.rows[t]);
    std::memset(&tiles, 0, sizeof tiles);
    tiles.config = config;
}
inline void release() { std::memset(&tiles, 0, sizeof tiles); }
inline void tile_zero(int t) {
    require(tiles.config.rows[t] > 0);
    std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}
inline void tile_load(int t, const void* from, int64_t stride) {
    tile_zero(t);
    for (int r = 0; r < tiles.config.rows[t]; ++r)
        std::memcpy(tiles.data[t][r], (const char*)from + r * stride, tiles.config.row_bytes[t]);
}
inline void tile_store(int t, void* to, int64_t stride) {
    require(tiles.config.rows[t] > 0);
    for (int r = 0; r < tiles.config.rows[t]; ++r)
        std::memcpy((char*)to + r * stride, tiles.data[t][r], tiles.config.row_bytes[t]);
}
inline void tile_multiply(int sum, int a, int b) {
    Tiles& t = tiles;  // looked up once: under the sanitizers that is slow
    const TileConfig& c = t.config;
    const int rows = c.rows[sum], columns = c.row_bytes[sum] / 4, deep = c.row_bytes[a];
    require(sum != a && sum != b && a != b && rows && rows == c.rows[a] && c.row_bytes[sum] == c.row_bytes[b] &&
            deep == 4 * c.rows[b] && c.row_bytes[b] % 4 == 0);
    for (int m = 0; m < rows; ++m) {
        int32_t total[16];
        std::memcpy(total, t.data[sum][m], sizeof total);
        for (int k = 0; k < deep; ++k) {
            const int x = (int8_t)t.data[a][m][k];
            const uint8_t* w = t.data[b][k / 4] + k % 4;
            for (int n = 0; n < columns; ++n) total[n] += x * w[4 * n];
        }
        std::memcpy(t.data[sum][m], total, sizeof total);
    }
}
#define QK_TILE_CONFIGURE(config) configure(config)
#define QK_TILE_RELEASE() release()
#define QK_TILE_ZERO(t) tile_zero(t)
#define QK_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define QK_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define QK_TILE_MULTIPLY(sum, a, b) tile_multiply(sum, a, b)

#else

// Macros: a tile's number is part of the instruction. GCC's loads do not tell the compiler that they read memory.
#define QK_TILE_BARRIER() __asm__ volatile("" ::: "memory")
#define QK_TILE_CONFIGURE(config)    \
    do {                             \
        QK_TILE_BARRIER();           \
        _tile_loadconfig(&(config)); \
    } while (0)
#define QK_TILE_RELEASE() _tile_release()
#define QK_TILE_ZERO(t) _tile_zero(t)
#define QK_TILE_LOAD(t, from, stride) \
    do {                              \
        QK_TILE_BARRIER();            \
        _tile_loadd(t, from, stride); \
    } while (0)
#define QK_TILE_STORE(t, to, stride) \
    do {                             \
        _tile_stored(t, to, stride); \
        QK_TILE_BARRIER();           \
    } while (0)
#define QK_TILE_MULTIPLY(sum, a, b) _tile_dpbsud(sum, a, b)

#endif

}  // namespace
