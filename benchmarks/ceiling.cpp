// What this machine can do at most: bytes read from memory, and byte dot products, a second. Built by ceiling.py with
// -march=native; independent of the library it is the measure of.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint64_t V __attribute__((vector_size(64)));

// n bytes as S streams that advance together, each line asked for `ahead` bytes before it is read: more pages are open at
// once than the hardware's own prefetching keeps for one stream.
template <int S>
static uint64_t read_part(const char* p, int64_t n, int64_t ahead) {
    const int64_t each = n / S;
    V s[4] = {};
    for (int64_t i = 0; i + 256 <= each; i += 256)
        for (int t = 0; t < S; ++t) {
            const char* q = p + t * each + i;
            for (int k = 0; k < 4; ++k) __builtin_prefetch(q + ahead + 64 * k, 0, 0);
            for (int k = 0; k < 4; ++k) s[k] ^= *(const V*)(q + 64 * k);
        }
    for (int k = 1; k < 4; ++k) s[0] ^= s[k];
    return s[0][0];
}

template <class F>
static void on_threads(int threads, F f) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([=] { f(t); });
    f(0);
    for (auto& o : others) o.join();
}

static volatile uint64_t sink;

// Reads n bytes once (64-byte aligned; n a multiple of threads * streams * 256), in 1, 2, 4 or 8 streams a thread;
// returns whether it knows that number of streams.
extern "C" int ceiling_read(const char* p, int64_t n, int threads, int streams, int64_t ahead) {
    uint64_t (*read)(const char*, int64_t, int64_t) = streams == 1   ? read_part<1>
                                                      : streams == 2 ? read_part<2>
                                                      : streams == 4 ? read_part<4>
                                                      : streams == 8 ? read_part<8>
                                                                     : nullptr;
    if (!read) return 0;
    on_threads(threads, [=](int t) { sink = read(p + t * (n / threads), n / threads, ahead); });
    return 1;
}

// n times twelve independent dot products of the widest kind this build knows; returns multiplications and additions of
// one such, 0 where there is none.
extern "C" int ceiling_dot(int64_t n, int threads) {
#if defined(__AVX512VNNI__)
#define STEP(i) "vpdpbusd %%zmm20, %%zmm21, %%zmm" #i "\n"
    constexpr int OPS = 128;
#elif defined(__AVX2__)
#define STEP(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm" #i "\n"
    constexpr int OPS = 64;
#endif
#if defined(STEP)
    on_threads(threads, [=](int) {
        int64_t left = n;
        asm volatile("1:\n" STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
                     "dec %0\njnz 1b\n"
                     : "+r"(left)
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    });
    return OPS;
#else
    return 0;
#endif
}
