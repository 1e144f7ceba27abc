// Runs every level of the CPU library that this machine (or emulator) has, through the C ABI, against plain loops: for
// machines without Python, for emulators, and under the sanitizers. Prints the levels; exits 1 at the first difference.
#include "../../kernels/cpu/qkit_decoder.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

namespace {

#define CHECK(condition, isa)                                                              \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::printf("line %d, level %d: not %s\n", __LINE__, (int)(isa), #condition); \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (0)

#if defined(__x86_64__)
constexpr int UNFUSED = QK_SCALAR;  // has no fused multiply-add
#else
constexpr int UNFUSED = -1;
#endif

uint64_t state = 1;
uint32_t random32() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 32);
}
float uniform() { return (float)(random32() >> 8) * 0x1p-23f - 1.0f; }

// Exactly n elements that end where a page begins which may not be touched: a kernel that reads or writes beyond them dies,
// and none may count on more than an element's alignment.
template <class T>
struct Array {
    explicit Array(int64_t n) : n(n) {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        size = ((size_t)n * sizeof(T) + page - 1) / page * page + page;
        map = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(map + size - page, page, PROT_NONE)) std::abort();
        at = (T*)(map + size - page) - n;
    }
    Array(const Array& o) : Array(o.n) { std::memcpy((void*)at, o.at, (size_t)bytes()); }
    Array& operator=(Array o) {
        std::swap(n, o.n), std::swap(size, o.size), std::swap(map, o.map), std::swap(at, o.at);
        return *this;
    }
    ~Array() { munmap(map, size); }
    T* data() { return at; }
    T& operator[](int64_t i) { return at[i]; }
    const T& operator[](int64_t i) const { return at[i]; }
    int64_t bytes() const { return n * (int64_t)sizeof(T); }
    bool operator==(const Array& o) const { return n == o.n && !std::memcmp(at, o.at, (size_t)bytes()); }

    int64_t n;
    size_t size;
    char* map;
    T* at;
};

float value_of(const void* x, int64_t i, int dtype) {
    if (dtype == QK_F32) return ((const float*)x)[i];
    const uint16_t h = ((const uint16_t*)x)[i];
    if (dtype == QK_F16) {
        const int e = (h >> 10) & 31, m = h & 1023;
        const float size = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024.0f + m, e - 25) : std::ldexp((float)m, -24);
        return h >> 15 ? -size : size;
    }
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Written by truncation: the driver needs values of a type, not roundings.
void put(void* x, int64_t i, int dtype, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == QK_F32) ((float*)x)[i] = value;
    else if (dtype == QK_BF16) ((uint16_t*)x)[i] = (uint16_t)(bits >> 16);
    else {
        const int e = (int)(bits >> 23 & 255) - 112;
        const uint32_t half = e <= 0 ? 0 : (uint32_t)e << 10 | (bits >> 13 & 1023);
        ((uint16_t*)x)[i] = (uint16_t)((bits >> 16 & 0x8000u) | half);
    }
}

template <class T>
Array<uint8_t> bytes_of(Array<T>& x) {
    Array<uint8_t> b(x.bytes());
    std::memcpy(b.data(), x.data(), (size_t)x.bytes());
    return b;
}

struct Buffer {  // values of a dtype
    Array<float> f;
    Array<uint16_t> h;
    int dtype;
    Buffer(int64_t n, int d) : f(d == QK_F32 ? n : 0), h(d == QK_F32 ? 0 : n), dtype(d) {}
    void* data() { return dtype == QK_F32 ? (void*)f.data() : (void*)h.data(); }
    float get(int64_t i) { return value_of(data(), i, dtype); }
    void set(int64_t i, float x) { put(data(), i, dtype, x); }
    bool operator==(const Buffer& o) const { return f == o.f && h == o.h; }  // bits
};

Array<uint8_t> bytes_of(Buffer& x) { return x.dtype == QK_F32 ? bytes_of(x.f) : bytes_of(x.h); }

const int DTYPES[] = {QK_F32, QK_F16, QK_BF16};
std::vector<int> levels;

void rows_kernels(int64_t rows, int64_t cols, int64_t groups, int bits, int dtype, bool symmetric) {
    const int64_t words = (cols * bits + 31) / 32, n = rows * cols;
    const float multipliers[] = {0.8f, 0.95f};
    Buffer w(n, dtype);
    for (int64_t i = 0; i < n; ++i) w.set(i, 0.05f * uniform());
    std::vector<Array<uint8_t>> first;
    for (const int isa : levels) {
        Array<uint8_t> codes(n), zero(rows * groups), back(n);
        Array<uint32_t> packed(rows * words), turned(rows * words);
        Array<double> stats(2 * rows);
        Buffer scale(rows * groups, dtype), out(n, dtype);
        double totals[2];
        uint8_t* z = symmetric ? nullptr : zero.data();
        CHECK(!qk_quantize_rtn(w.data(), dtype, codes.data(), scale.data(), dtype, z, stats.data(), totals, rows, cols,
                               groups, bits, 0, multipliers, 2, isa, 2), isa);
        CHECK(!qk_pack(codes.data(), packed.data(), rows, cols, bits, isa, 2), isa);
        CHECK(!qk_unpack(packed.data(), back.data(), rows, cols, bits, isa, 2) && back == codes, isa);
        CHECK(!qk_dequantize(packed.data(), scale.data(), dtype, z, out.data(), dtype, rows, cols, groups, bits, isa, 2),
              isa);
        if (cols * bits % 32 == 0) {
            CHECK(!qk_pack_transposed(codes.data(), turned.data(), rows, cols, bits, isa, 2), isa);
            for (int64_t i = 0; i < rows * words; ++i) CHECK(turned[i % words * rows + i / words] == packed[i], isa);
            CHECK(!qk_unpack_transposed(turned.data(), back.data(), rows, cols, bits, isa, 2) && back == codes, isa);
        }
        std::vector<Array<uint8_t>> here = {codes, zero, bytes_of(packed), bytes_of(scale), bytes_of(out)};
        if (first.empty()) {  // the others must give the same bits
            first = here;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t g = i / cols * groups + i % cols / (cols / groups), at = i % cols * bits;
                const int code = codes[i], middle = symmetric ? 1 << (bits - 1) : zero[g];
                const float exact = (float)(code - middle) * scale.get(g);
                CHECK((int)(packed[i / cols * words + at / 32] >> at % 32 & ((1u << bits) - 1)) == code, isa);
                CHECK(std::fabs(out.get(i) - exact) <= std::fabs(exact) * 0x1p-8f + 1e-6f, isa);
                CHECK(std::fabs(w.get(i) - exact) <= 0.02f, isa);
            }
        }
        CHECK(here == first, isa);
    }
}

struct Weight {
    Array<uint32_t> codes;
    Buffer scale;
    Array<uint8_t> zero;
    std::vector<double> exact;  // [rows][cols]
    QkWeight c;
};

const float TABLE[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.25, -0.5, -1, -1.5, -2, -3, -4, -6};

Weight make(int64_t rows, int64_t cols, int64_t groups, int bits, int dtype, bool symmetric, bool table) {
    const int64_t words = (cols * bits + 31) / 32, wide = (rows + 31) / 32 * 32;
    Weight w{Array<uint32_t>(qk_prepacked_bytes(rows, cols, bits) / 4), Buffer(wide * groups, dtype),
             Array<uint8_t>(wide * groups), std::vector<double>((size_t)(rows * cols)), {}};
    Array<uint8_t> codes(rows * cols);
    Array<uint32_t> packed(rows * words), back(rows * words);
    for (int64_t i = 0; i < rows * cols; ++i) codes[i] = (uint8_t)(random32() >> (32 - bits));
    if (cols * bits % 32 == 0)  // the largest sums
        for (int64_t i = 0; i < cols; ++i) codes[i] = (uint8_t)((1 << bits) - 1);
    CHECK(!qk_pack(codes.data(), packed.data(), rows, cols, bits, QK_SCALAR, 1), 0);
    CHECK(!qk_prepack(packed.data(), w.codes.data(), rows, cols, bits, 2), 0);
    CHECK(!qk_restore(w.codes.data(), back.data(), rows, cols, bits, 2) && back == packed, 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = (r / 32 * groups + g) * 32 + r % 32;
            w.scale.set(at, 0.02f + 0.01f * uniform());
            w.zero[at] = (uint8_t)(random32() >> (32 - bits));
            const int middle = symmetric ? 1 << (bits - 1) : w.zero[at];
            for (int64_t i = g * (cols / groups); i < (g + 1) * (cols / groups); ++i) {
                const int code = codes[r * cols + i];
                w.exact[(size_t)(r * cols + i)] = (table ? TABLE[code] : code - middle) * (double)w.scale.get(at);
            }
        }
    w.c = {w.codes.data(), w.scale.data(), symmetric ? nullptr : w.zero.data(), table ? TABLE : nullptr,
           rows, cols, groups, bits, dtype};
    return w;
}

void products(const Weight& w, int64_t m, int dtype, bool int8) {
    const int64_t rows = w.c.rows, cols = w.c.cols;
    Buffer x(m * cols, dtype), bias(rows, dtype);
    for (int64_t i = 0; i < m * cols; ++i) x.set(i, i % cols == cols - 1 ? 1.0f : uniform());
    for (int64_t i = 0; i < cols && m > 1; ++i) x.set(i, 0.984375f);  // row 0: the largest sums
    for (int64_t i = 0; i < rows; ++i) bias.set(i, uniform());

    std::vector<double> expected((size_t)(m * rows)), slack((size_t)(m * rows));
    for (int64_t r = 0; r < m; ++r) {
        std::vector<double> input((size_t)cols);
        float most = 0.0f;
        for (int64_t i = 0; i < cols; ++i) most = std::fmax(most, std::fabs(x.get(r * cols + i)));
        for (int64_t i = 0; i < cols; ++i) {
            const float value = x.get(r * cols + i), step = most / 127.0f;
            input[(size_t)i] = int8 ? std::nearbyint(value / step) * (double)step : (double)value;
        }
        for (int64_t o = 0; o < rows; ++o) {
            double sum = 0.0, size = 0.0;
            for (int64_t i = 0; i < cols; ++i) {
                sum += w.exact[(size_t)(o * cols + i)] * input[(size_t)i];
                size += std::fabs(w.exact[(size_t)(o * cols + i)]);
            }
            // Fixed point loses half a step of each input; int8 and codebooks nothing; then float32 sums and the output.
            const double lost = int8 || w.c.table ? 0.0 : dtype == QK_F32 ? 0x1p-24 : 0x1p-16;
            sum += bias.get(o);
            expected[(size_t)(r * rows + o)] = sum;
            slack[(size_t)(r * rows + o)] = most * size * (lost + 0x1p-20) + 1e-5 +
                                            std::fabs(sum) * (dtype == QK_F32 ? 0x1p-22 : dtype == QK_F16 ? 0x1p-10 : 0x1p-8);
        }
    }
    int before = -1;
    Buffer previous(0, dtype);
    for (const int isa : levels) {
        Buffer y(m * rows, dtype);
        CHECK(!qk_matmul(&w.c, x.data(), dtype, bias.data(), y.data(), m, int8, isa, 2), isa);
        for (int64_t i = 0; i < m * rows; ++i)
            if (!(std::fabs(y.get(i) - expected[(size_t)i]) <= slack[(size_t)i])) {
                std::printf("[%lld, %lld] of [%lld, %lld] in %lld groups, %d bits, dtype %d: %.9g, expected %.9g\n",
                            (long long)(i / rows), (long long)(i % rows), (long long)rows, (long long)cols,
                            (long long)w.c.groups, w.c.bits, dtype, y.get(i), expected[(size_t)i]);
                CHECK(false, isa);
            }
        // Integers are exact, and what follows is the same wherever multiply-add is fused: not on x86 below AVX2.
        const bool fused = before >= 0 && before != UNFUSED;
        const bool floats = dtype == QK_BF16 && !int8 && m >= 48 && (isa == QK_AVX512BF16 || before == QK_AVX512BF16);
        if (fused && !w.c.table && !floats) CHECK(y == previous, isa);
        before = isa;
        previous = y;
    }
}

// Block types of ggml: every level finds what the first does; a codebook, minima and a power of two among them.
void blocks(int64_t rows, int64_t cols, int dtype, bool weighed) {
    const float targets[] = {-8.0f, -7.4f, 7.0f, 7.6f}, spans[] = {14.6f, 15.0f, 15.4f};
    const float levels_of[] = {-127.0f, -65.0f, -22.0f, 1.0f, 38.0f, 113.0f}, ends[] = {-127.0f, -111.0f, 113.0f};
    const float halves[] = {-4.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f, 4.0f};
    const uint8_t stored[] = {7, 6, 5, 0, 1, 2, 3};
    const QkPiece alone[] = {{QK_D, 0, 0, 0, 0}, {QK_CODES, 0, 4, 1, 1}, {QK_CODES, 0, 0, 4, 16}};
    const QkPiece bytes[] = {{QK_D, 0, 0, 0, 0}, {QK_CODES, -127, 0, 8, 1}};
    const QkPiece both[] = {{QK_D, 0, 0, 0, 0}, {QK_DMIN, 0, 0, 0, 0}, {QK_CODES, 0, 0, 4, 16}};
    const QkPiece wide[] = {{QK_SCALES, 0, 0, 4, 16}, {QK_CODES, 0, 0, 2, 32}, {QK_D, 0, 0, 0, 0}, {QK_DMIN, 0, 0, 0, 0}};
    const QkPiece six[] = {{QK_D, 0, 0, 0, 0}, {QK_DMIN, 0, 0, 0, 0}, {QK_SCALE_MIN, 0, 0, 0, 0}, {QK_CODES, 0, 0, 4, 32}};
    const QkPiece split[] = {{QK_CODES, 0, 2, 1, 32}, {QK_SCALES, 32, 4, 2, 4}, {QK_D, 0, 0, 0, 0}};
    const QkPiece eight[] = {{QK_D, 0, 0, 0, 0}, {QK_SCALES, 32, 0, 4, 1}, {QK_CODES, 0, 0, 8, 1}};
    const QkGrid grids[] = {
        {32, -8, 7, 0, 0, 0, 0, 0, 4, 3, nullptr, targets, nullptr, alone},      // a scale of its own
        {32, -127, 127, 0, 0, 0, 0, 0, 0, 2, nullptr, nullptr, nullptr, bytes},  // at the largest weight
        {32, 0, 15, 1, 0, 0, 0, 0, 3, 3, nullptr, spans, nullptr, both},         // and a minimum
        {16, 0, 15, 1, 0, 0, 15, 0, 3, 4, nullptr, spans, nullptr, wide},        // of a super-block
        {32, 0, 15, 1, 0, 0, 63, 0, 3, 4, nullptr, spans, nullptr, six},
        {16, -8, 7, 0, 0, -32, 31, 0, 4, 3, nullptr, targets, nullptr, split},
        {32, -127, 113, 0, 0, -32, 31, 6, 3, 3, levels_of, ends, nullptr, eight},
        {32, -4, 4, 0, 1, 0, 0, 7, 0, 3, halves, nullptr, stored, alone},
    };
    const int64_t sizes[] = {22, 34, 20, 84, 144, 38, 262, 21};  // bytes of a block
    Buffer w(rows * cols, dtype);
    Array<float> weight(cols);
    for (int64_t i = 0; i < rows * cols; ++i) w.set(i, 0.05f * uniform());
    for (int64_t i = 0; i < cols; ++i) weight[i] = uniform() + 1.5f;
    for (size_t i = 0; i < std::size(grids); ++i) {
        const QkGrid& g = grids[i];
        const int64_t size = g.most ? 256 : g.sub;
        if (cols % size) continue;
        Array<uint8_t> first(0);
        for (const int isa : levels) {
            Array<uint8_t> out(rows * (cols / size) * sizes[i]);
            Array<double> stats(3 * ((rows + 15) / 16));
            double totals[2];
            CHECK(!qk_ggml_encode(w.data(), dtype, weighed ? weight.data() : nullptr, &g, out.data(), stats.data(), totals,
                                  rows, cols, isa, 2), isa);
            if (isa == levels[0]) first = bytes_of(out);
            CHECK(bytes_of(out) == first, isa);
        }
    }
}

// bfloat16 of uniform numbers times `scale`, plus `more`.
Array<uint16_t> halves(int64_t n, float scale, float more = 0.0f) {
    Array<uint16_t> made(n);
    for (int64_t i = 0; i < n; ++i) {
        const float value = uniform() * scale + more;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        made[i] = (uint16_t)(bits >> 16);
    }
    return made;
}
float wide(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A decoding step, or `batch` tokens of a prompt: every level comes as close to the first as rounding lets it. Sizes are no
// multiples of a vector.
void step(int64_t batch, int64_t length, int activation, bool prompt = false) {
    const int64_t hidden = 40, wide_ = 56, heads = 6, kv = 2, dim = 24, vocabulary = 37, half = dim / 2;
    const int64_t shapes[][2] = {{heads * dim, hidden}, {kv * dim, hidden}, {kv * dim, hidden}, {hidden, heads * dim},
                                 {wide_, hidden},       {wide_, hidden},    {hidden, wide_},    {vocabulary, hidden}};
    std::vector<std::unique_ptr<Weight>> packed;  // which point into themselves, and so stay where they are
    std::vector<Array<uint16_t>> dense;
    dense.reserve(8);
    QkLinear linears[8];
    for (int i = 0; i < 8; ++i) {
        const int64_t rows = shapes[i][0], cols = shapes[i][1];
        linears[i] = {{}, nullptr, nullptr, rows, cols, i == 5};
        if (i % 3 == 1) {
            dense.push_back(halves(rows * cols, 0.3f));
            linears[i].dense = dense.back().data();
        } else {
            packed.emplace_back(new Weight(make(rows, cols, 1, i % 3 ? 8 : 4, QK_F32, i < 4, false)));
            linears[i].quantized = packed.back()->c;
        }
    }
    const Array<uint16_t> norm = halves(hidden, 0.2f, 0.05f), own = halves(dim, 0.2f, 1.0f), embedding = halves(vocabulary * hidden, 1.0f);
    const int64_t entries = length + (prompt ? batch : 1), sequences = prompt ? 1 : batch;
    Array<float> cosine(entries * half), sine(entries * half);
    for (int64_t i = 0; i < entries * half; ++i) cosine[i] = std::cos(0.1f * (float)i), sine[i] = std::sin(0.1f * (float)i);
    QkLayer layers[2];
    for (QkLayer& l : layers) {
        l = {linears[0], linears[1], linears[2], linears[3], linears[4], linears[5], linears[6], norm.at, norm.at, norm.at,
             norm.at, own.at, own.at, cosine.data(), sine.data(), 0};
    }
    layers[1].window = 290;
    const QkDecoder d = {layers, 2, hidden, wide_, heads, kv, dim, vocabulary, embedding.at, norm.at, linears[7], 1.0f, 0.2f,
                         1e-5f, 0.0f, activation};
    const int64_t start = length > 290 ? length - 290 : 0;
    std::vector<Array<uint16_t>> cached;
    for (int i = 0; i < 4; ++i) cached.push_back(halves(sequences * kv * (entries - (i < 2 ? 0 : start)) * dim, 1.0f));
    std::vector<int64_t> tokens, positions, first;
    for (int64_t b = 0; b < batch; ++b) {
        tokens.push_back(b % vocabulary);
        positions.push_back(prompt ? length + b : length);
        first.push_back(b % (length + 1));
    }
    const auto call = [&](const QkCache* caches, uint16_t* logits, int isa) {
        const int64_t *t = tokens.data(), *p = positions.data();
        return prompt ? qk_prompt(&d, caches, batch, length, t, p, length / 3, logits, isa, 2)
                      : qk_decode(&d, caches, batch, length, t, p, first.data(), logits, isa, 2);
    };
    Array<uint16_t> expected(0);
    for (const int isa : levels) {
        std::vector<Array<uint16_t>> own_cache = cached;
        const QkCache caches[2] = {{own_cache[0].data(), own_cache[1].data(), entries, 0},
                                   {own_cache[2].data(), own_cache[3].data(), entries - start, start}};
        Array<uint16_t> logits(sequences * vocabulary);
        if (prompt) CHECK(!call(caches, nullptr, isa), isa);
        CHECK(!call(caches, logits.data(), isa), isa);
        if (isa == levels[0]) expected = logits;
        double off = 0.0, all = 0.0;
        for (int64_t i = 0; i < sequences * vocabulary; ++i) {
            const double a = wide(logits[i]), b = wide(expected[i]);
            off += (a - b) * (a - b), all += b * b;
        }
        CHECK(all > 0.0 && off <= 0.01 * 0.01 * all, isa);
    }
    CHECK(call(nullptr, expected.data(), 0) == QK_NULL, 0);
    const QkCache full[2] = {{cached[0].data(), cached[1].data(), entries - 1, 0},
                             {cached[2].data(), cached[3].data(), entries - 1, 0}};
    CHECK(call(full, expected.data(), 0) == QK_BAD_SHAPE, 0);
}

// Against a bit at a time.
void crc(int64_t n) {
    Array<uint8_t> data(n);
    uint32_t expected = ~0u, found = 0;
    for (int64_t i = 0; i < n; ++i) {
        data[i] = (uint8_t)(100.0f * uniform());
        expected ^= data[i];
        for (int k = 0; k < 8; ++k) expected = expected >> 1 ^ (expected & 1 ? 0xedb88320u : 0u);
    }
    const int status = qk_crc32(data.data(), n, &found);
    CHECK(status == QK_BAD_ISA || (!status && found == ~expected), 0);
}

void bad_arguments() {
    Array<uint32_t> words(64);
    uint32_t* p = words.data();
    const int64_t huge = int64_t{1} << 62;
    CHECK(qk_pack((uint8_t*)p, p, 1, 8, 5, 0, 1) == QK_BAD_BITS, 0);
    CHECK(qk_pack((uint8_t*)p, p, huge, 8, 4, 0, 1) == QK_BAD_SHAPE, 0);
    CHECK(qk_pack(nullptr, p, 1, 8, 4, 0, 1) == QK_NULL, 0);
    CHECK(qk_pack((uint8_t*)p, p, 1, 8, 4, QK_ISA_COUNT, 1) == QK_BAD_ISA, 0);
    CHECK(qk_pack((uint8_t*)p, p, 1, 8, 4, -1, 1) == QK_BAD_ISA, 0);
    CHECK(qk_prepacked_bytes(huge, huge, 4) == -1, 0);
    CHECK(qk_prepack(p, p, huge, 8, 4, 1) == QK_BAD_SHAPE, 0);
    QkWeight w = {p, p, nullptr, nullptr, 1, 8, 1, 4, QK_F32};
    CHECK(qk_matmul(&w, p, QK_F32, nullptr, p, huge, 0, 0, 1) == QK_BAD_SHAPE, 0);
    CHECK(qk_matmul(&w, p, 3, nullptr, p, 1, 0, 0, 1) == QK_BAD_DTYPE, 0);
    w.cols = huge;
    CHECK(qk_matmul(&w, p, QK_F32, nullptr, p, 1, 0, 0, 1) == QK_BAD_SHAPE, 0);
    w.cols = 8;
    w.groups = 3;
    CHECK(qk_matmul(&w, p, QK_F32, nullptr, p, 1, 0, 0, 1) == QK_BAD_SHAPE, 0);
    CHECK(qk_matmul(nullptr, p, QK_F32, nullptr, p, 1, 0, 0, 1) == QK_NULL, 0);
    const QkPiece piece[] = {{QK_D, 0, 0, 0, 0}, {QK_CODES, 0, 0, 4, 16}}, odd[] = {{QK_CODES, 0, 0, 3, 16}},
                  long_run[] = {{QK_CODES, 0, 0, 4, 32}}, no_scales[] = {{QK_SCALES, 0, 0, 8, 1}};
    QkGrid g = {32, -8, 7, 0, 0, 0, 0, 0, 0, 2, nullptr, nullptr, nullptr, piece};
    uint8_t* out = (uint8_t*)p;
    double s = 0.0, totals[2];
    auto encode = [&](int dtype, const QkGrid* grid, uint8_t* to, int64_t cols) {
        return qk_ggml_encode(p, dtype, nullptr, grid, to, &s, totals, 1, cols, 0, 1);
    };
    CHECK(encode(QK_F32, &g, out, 33) == QK_BAD_SHAPE, 0);
    CHECK(encode(QK_F32, nullptr, out, 32) == QK_NULL, 0);
    CHECK(encode(9, &g, out, 32) == QK_BAD_DTYPE, 0);
    CHECK(encode(QK_F32, &g, nullptr, 32) == QK_NULL, 0);
    g.n_pieces = 1;
    for (const QkPiece* bad : {odd, long_run, no_scales}) {
        g.pieces = bad;
        CHECK(encode(QK_F32, &g, out, 32) == QK_BAD_SHAPE, 0);
    }
    g.pieces = nullptr;
    CHECK(encode(QK_F32, &g, out, 32) == QK_BAD_SHAPE, 0);
    g.pieces = piece;
    g.sub = 24;
    CHECK(encode(QK_F32, &g, out, 32) == QK_BAD_SHAPE, 0);
    uint32_t sum;
    CHECK(qk_crc32(out, -1, &sum) == QK_BAD_SHAPE, 0);
    CHECK(qk_crc32(nullptr, 1, &sum) == QK_NULL, 0);
}

}  // namespace

int main() {
    std::printf("levels");
    for (int isa = 0; isa < QK_ISA_COUNT; ++isa)
        if (qk_has_isa(isa)) {
            levels.push_back(isa);
            std::printf(" %d", isa);
        }
    std::printf("\n");

    bad_arguments();
    // rows, cols, groups: blocks of 32 rows and of 128 columns that are full, ragged, several to a group.
    const int64_t shapes[][3] = {{33, 512, 4}, {5, 192, 6}, {9, 104, 1}, {3, 144, 6}, {65, 640, 2}, {4, 8, 1}, {40, 101, 1}};
    for (const auto& s : shapes)
        for (const int bits : {4, 8})
            for (const int dtype : DTYPES)
                for (const bool symmetric : {false, true}) {
                    rows_kernels(s[0] % 7 + 1, s[1], s[2], bits, dtype, symmetric);
                    const Weight w = make(s[0], s[1], s[2], bits, DTYPES[s[1] % 3], symmetric, false);
                    for (const int64_t m : {1, 7, 50})
                        for (const bool int8 : {false, true}) products(w, m, dtype, int8);
                    if (bits == 8 || !symmetric) continue;
                    const Weight t = make(s[0], s[1], s[2], 4, QK_F32, true, true);
                    for (const int64_t m : {1, 13}) products(t, m, dtype, false);
                }
    for (const int dtype : DTYPES)
        for (const bool weighed : {false, true}) {
            blocks(33, 512, dtype, weighed);
            blocks(3, 96, dtype, weighed);
        }
    for (const int64_t batch : {1, 2, 7})
        for (const int64_t length : {0, 13, 256, 300}) step(batch, length, (int)(length % 2));
    for (const int64_t n : {1, 13, 55})
        for (const int64_t length : {0, 13, 300}) step(n, length, (int)(length % 2), true);
    for (const int64_t n : {0, 1, 63, 64, 65, 1000}) crc(n);
    std::printf("ok\n");
}
