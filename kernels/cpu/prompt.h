// Attention of many queries of one key-value head (step_types.h: PromptArgs), flash-attention's way (arXiv:2205.14135):
// keys and values are met a span at a time, and what was summed before shrinks where a larger score turns up.
//
// Lanes are queries, so that no sum crosses a lane: scores are keys times queries^T, the outputs values^T times weights^T.
// Of both products the first operand is read value by value from where it lies, and the second is made of pairs of
// bfloat16, one a lane: neighbouring values of a query, and the weights of neighbouring keys.
#pragma once
#include <cmath>

#include "attend.h"

namespace {

using qkit::PromptArgs;

constexpr int QUERY_VECTORS = REGISTER_BYTES == 64 ? 2 : 1;
constexpr int QUERIES = QUERY_VECTORS * LANES;        // that a pass over a span serves
constexpr int TALL = REGISTER_BYTES == 64 ? 8 : 4;    // keys, or outputs, whose sums are registers
constexpr int64_t KEYS = 128;                         // of a span
constexpr int64_t PASSES = qkit::PROMPT_QUERIES / QUERIES;
constexpr float NOTHING = -1e30f;  // below every score, and finite

QK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

QK_INLINE I to_pair(F low, F high) {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t TURNS[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high.v[0], (__m512)low.v[0]);
    I r;
    r.v[0] = (RawI)_mm512_permutexvar_epi16(_mm512_load_si512(TURNS), both);
    return r;
#else
    return (BF16::bits(low) & splat(0xffff)) | (BF16::bits(high) << 16);
#endif
}

// What one pass keeps from span to span.
struct Pass {
    alignas(64) uint32_t q[qkit::PROMPT_DIM / 2 * QUERIES];  // [dim / 2][QUERIES] pairs
    alignas(64) float out[qkit::PROMPT_DIM * QUERIES];       // [dim][QUERIES]
    F most[QUERY_VECTORS], total[QUERY_VECTORS];
    I entry[QUERY_VECTORS];  // of each query, counted from PromptArgs::from
    int64_t count;           // queries; lanes beyond repeat the last one
    int64_t first, last;     // the least and the largest entry
};

struct PromptScratch {
    Pass passes[PASSES];
    alignas(64) float scores[KEYS * QUERIES];                     // [keys][QUERIES]
    alignas(64) uint32_t weights[KEYS / 2 * QUERIES];             // [keys / 2][QUERIES] pairs
    alignas(64) uint16_t values[KEYS * qkit::PROMPT_DIM];         // [keys / 2][dim] pairs
};

uint16_t* query_of(const PromptArgs& a, int64_t i) { return a.q + i / a.group * a.row + i % a.group * a.dim; }

void begin_pass(const PromptArgs& a, int64_t first, Pass& pass) {
    pass.count = least(QUERIES, a.end - first);
    int32_t entry[QUERIES];
    for (int64_t i = 0; i < QUERIES; ++i) {
        const int64_t query = first + least(i, pass.count - 1);
        const uint16_t* q = query_of(a, query);
        entry[i] = (int32_t)(a.entry + query / a.group - a.from);
        for (int64_t d = a.dim / 32 * 32; d < a.dim; d += 2) std::memcpy(pass.q + d / 2 * QUERIES + i, q + d, 4);
    }
    for (int v = 0; v < QUERY_VECTORS; ++v)
        for (int64_t d = 0; d + 32 <= a.dim; d += 32) {
            F x[LANES];
            for (int64_t i = 0; i < LANES; ++i)
                x[i] = load((const float*)(query_of(a, first + least(v * LANES + i, pass.count - 1)) + d));
            transpose(x);
            for (int64_t i = 0; i < LANES; ++i) store((float*)pass.q + (d / 2 + i) * QUERIES + v * LANES, x[i]);
        }
    pass.first = entry[0], pass.last = entry[QUERIES - 1];
    for (int v = 0; v < QUERY_VECTORS; ++v) {
        pass.entry[v] = load((const uint32_t*)entry + v * LANES);
        pass.most[v] = splat(NOTHING);
        pass.total[v] = splat(0.0f);
    }
    std::memset(pass.out, 0, (size_t)(a.dim * QUERIES) * sizeof(float));
}

// Scores of entries at .. at + n, minus infinity where a query does not see the entry.
void score(const PromptArgs& a, const Pass& pass, int64_t at, int64_t n, float* scores) {
    const F scale = splat(a.scale);
    for (int64_t k = 0; k < n; k += TALL) {
        // Fewer than TALL at the end: some once more.
        const int64_t first = n < TALL ? 0 : least(k, n - TALL), rows = least(TALL, n);
        F sum[TALL][QUERY_VECTORS];
#pragma GCC unroll 8
        for (int t = 0; t < TALL; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < QUERY_VECTORS; ++v) sum[t][v] = splat(0.0f);
        const uint16_t* keys = a.keys + (at + first) * a.dim;
        if (rows == TALL) multiply_pairs<TALL>(keys, a.dim, 2, pass.q, a.dim / 2, sum);
        else
            for (int64_t t = 0; t < rows; ++t) multiply_pairs<1>(keys + t * a.dim, a.dim, 2, pass.q, a.dim / 2, sum + t);
        for (int64_t t = 0; t < rows; ++t)
            for (int v = 0; v < QUERY_VECTORS; ++v) store(scores + (first + t) * QUERIES + v * LANES, sum[t][v] * scale);
    }
    if (at + n - 1 <= pass.first && (!a.window || at > pass.last - a.window)) return;
    const I hidden = bits_of(splat(-INFINITY)), window = splat(a.window ? (int32_t)a.window : INT32_MAX);
    for (int64_t k = 0; k < n; ++k)
        for (int v = 0; v < QUERY_VECTORS; ++v) {
            float* s = scores + k * QUERIES + v * LANES;
            const I key = splat((int32_t)(at + k));
            const I unseen = greater(key, pass.entry[v]) | greater(pass.entry[v] - key, window - splat(1));
            store(s, from_bits(without(bits_of(load(s)), unseen) | (hidden & unseen)));
        }
}

// Scores of n keys to weights, in pairs of keys, the last one's other zero; the outputs so far shrink to the largest score.
void weigh(const PromptArgs& a, Pass& pass, int64_t n, const float* scores, uint32_t* weights) {
    for (int v = 0; v < QUERY_VECTORS; ++v) {
        F most = pass.most[v];
        for (int64_t k = 0; k < n; ++k) most = max(load(scores + k * QUERIES + v * LANES), most);
        const F shrink = exponential(pass.most[v] - most);
        F all = splat(0.0f);
        for (int64_t k = 0; k < n; k += 2) {
            const F low = exponential(load(scores + k * QUERIES + v * LANES) - most);
            const F high = k + 1 < n ? exponential(load(scores + (k + 1) * QUERIES + v * LANES) - most) : splat(0.0f);
            all = all + low + high;
            store(weights + k / 2 * QUERIES + v * LANES, to_pair(low, high));
        }
        pass.total[v] = fused(pass.total[v], shrink, all);
        pass.most[v] = most;
        for (int64_t d = 0; d < a.dim; ++d) {
            float* out = pass.out + d * QUERIES + v * LANES;
            store(out, load(out) * shrink);
        }
    }
}

// values [n / 2][dim] pairs: of neighbouring entries.
void pair_values(const PromptArgs& a, int64_t at, int64_t n, uint16_t* values) {
    for (int64_t k = 0; k < n; k += 2) {
        const uint16_t *low = a.values + (at + k) * a.dim, *high = low + a.dim;
        uint32_t* to = (uint32_t*)(values + k * a.dim);
        for (int64_t d = 0; d < a.dim; ++d) to[d] = low[d] | (k + 1 < n ? (uint32_t)high[d] << 16 : 0);
    }
}

void add_values(const PromptArgs& a, Pass& pass, int64_t n, const uint16_t* values, const uint32_t* weights) {
    for (int64_t d = 0; d < a.dim; d += TALL) {
        F sum[TALL][QUERY_VECTORS];
        float* out = pass.out + d * QUERIES;
#pragma GCC unroll 8
        for (int t = 0; t < TALL; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < QUERY_VECTORS; ++v) sum[t][v] = load(out + t * QUERIES + v * LANES);
        multiply_pairs<TALL>(values + 2 * d, 2, 2 * a.dim, weights, (n + 1) / 2, sum);
#pragma GCC unroll 8
        for (int t = 0; t < TALL; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < QUERY_VECTORS; ++v) store(out + t * QUERIES + v * LANES, sum[t][v]);
    }
}

void end_pass(const PromptArgs& a, int64_t first, const Pass& pass) {
    for (int v = 0; v < QUERY_VECTORS; ++v) {
        const F share = splat(1.0f) / pass.total[v];
        const int64_t begin = v * LANES, count = least(LANES, pass.count - begin);
        const auto pair = [&](int64_t d) {
            const float* out = pass.out + d * QUERIES + begin;
            return from_bits(to_pair(load(out) * share, load(out + QUERIES) * share));
        };
        int64_t d = 0;
        for (; d + 32 <= a.dim; d += 32) {
            F x[LANES];
            for (int64_t i = 0; i < LANES; ++i) x[i] = pair(d + 2 * i);
            transpose(x);
            for (int64_t i = 0; i < count; ++i) store((float*)(query_of(a, first + begin + i) + d), x[i]);
        }
        for (; d < a.dim; d += 2) {
            float x[LANES];
            store(x, pair(d));
            for (int64_t i = 0; i < count; ++i) std::memcpy(query_of(a, first + begin + i) + d, x + i, 4);
        }
    }
}

void step_attend_prompt(const PromptArgs& a) {
    PromptScratch s;
    const int64_t passes = (a.end - a.begin + QUERIES - 1) / QUERIES;
    for (int64_t p = 0; p < passes; ++p) begin_pass(a, a.begin + p * QUERIES, s.passes[p]);
    const int64_t entries = a.entry + (a.end - 1) / a.group - a.from + 1;
    for (int64_t at = 0; at < entries; at += KEYS) {
        const int64_t n = least(KEYS, entries - at);
        bool paired = false;
        for (int64_t p = 0; p < passes; ++p) {
            Pass& pass = s.passes[p];
            const int64_t seen = least(n, pass.last + 1 - at);  // by the last of them
            if (seen <= 0 || (a.window && at + n <= pass.first + 1 - a.window)) continue;
            if (!paired) pair_values(a, at, n, s.values);
            paired = true;
            score(a, pass, at, seen, s.scores);
            weigh(a, pass, seen, s.scores, s.weights);
            add_values(a, pass, seen, s.values, s.weights);
        }
    }
    for (int64_t p = 0; p < passes; ++p) end_pass(a, a.begin + p * QUERIES, s.passes[p]);
}

const qkit::StepKernels STEP = {step_widen, step_narrow, step_add,    step_norm,           step_rotate,
                                step_gated, step_attend, step_attend_prompt, step_dense};

}  // namespace
