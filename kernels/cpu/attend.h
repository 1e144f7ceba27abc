// Attention of one query a head (step_types.h: AttendArgs). Up to four queries share what is read. As in prompt.h, products
// are those of pairs of bfloat16: neighbouring values of a key, and of two neighbouring entries the values in one place, to
// which their rounded weights belong.
#pragma once
#include "pairs.h"
#include "step.h"
#include "transposes.h"

namespace {

using qkit::AttendArgs;
using qkit::SPAN;

constexpr int64_t PAIRED = 2 * LANES;  // values in a vector of pairs
constexpr int64_t NEAR = 32;           // entries whose values stay in the nearest cache

// How many values ahead of those in use are asked for: the processor does not follow several rows at a time by itself. Of
// a span that is not whole none: what lies behind it is no entry.
QK_INLINE int64_t ahead(const AttendArgs& a, int64_t bytes) { return a.n == SPAN ? bytes / (int64_t)sizeof(uint16_t) : 0; }

// sum[KEYS][G] of neighbouring keys and queries.
template <int G, int KEYS>
QK_INLINE void dots(const AttendArgs& a, const uint16_t* q, const uint16_t* keys, F (*sums)[LANES]) {
    F sum[G][KEYS];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; ++t) sum[g][t] = splat(0.0f);
    const int64_t later = ahead(a, 8192);
    const auto add = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        I key[KEYS];
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; ++t) {
            key[t] = pairs(keys + t * a.dim + i, n);
            __builtin_prefetch(keys + t * a.dim + i + later);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            const I query = pairs(q + g * a.dim + i, n);
#pragma GCC unroll 4
            for (int t = 0; t < KEYS; ++t) sum[g][t] = add_pairs(sum[g][t], key[t], query);
        }
    };
    int64_t i = 0;
    for (; i + PAIRED <= a.dim; i += PAIRED) add(i, PAIRED);
    if (i < a.dim) add(i, a.dim - i);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; ++t) sums[g][t] = sum[g][t];
}

// Scores of G queries, [G][SPAN]; what stands behind the last is undefined.
template <int G>
void scores_of(const AttendArgs& a, const uint16_t* q, float* scores) {
    constexpr int KEYS = REGISTER_BYTES == 64 ? 4 : 1;
    for (int64_t t = 0; t < a.n; t += LANES) {
        F sums[G][LANES];
        const int64_t n = a.n - t < LANES ? a.n - t : LANES;
        const uint16_t* keys = a.keys + t * a.dim;
        int64_t i = 0;
        for (; i + KEYS <= n; i += KEYS) dots<G, KEYS>(a, q, keys + i * a.dim, (F(*)[LANES])(sums[0] + i));
        for (; i < n; ++i) dots<G, 1>(a, q, keys + i * a.dim, (F(*)[LANES])(sums[0] + i));
        for (; i < LANES; ++i)
            for (int g = 0; g < G; ++g) sums[g][i] = splat(0.0f);
        for (int g = 0; g < G; ++g) store(scores + g * SPAN + t, totals(sums[g]) * splat(a.scale));
    }
}

// n scores to weights, their exponentials; of those behind, none is used.
QK_INLINE void softmax(float* scores, int64_t n, uint16_t* weights, float& most, float& sum) {
    for (int64_t i = n; i % LANES; ++i) scores[i] = -INFINITY;
    F high = load(scores), all = splat(0.0f);
    for (int64_t i = LANES; i < n; i += LANES) high = max(high, load(scores + i));
    most = largest(high);
    for (int64_t i = 0; i < n; i += LANES) {
        const F e = exponential(load(scores + i) - splat(most));
        BF16::store16(weights + i, e);
        all = all + e;  // those beyond n are far below what a float beside 1 can show
    }
    sum = total(all);
}

// sums[G][2 * VECTORS vectors] += n entries' values from `values` on times weights. A vector of even places, one of odd ones.
template <int G, int VECTORS>
QK_INLINE void add_weighed(const AttendArgs& a, const uint16_t* values, int64_t width, int64_t n, const uint16_t* weights,
                           float* sums, int64_t row) {
    const int64_t later = ahead(a, 16384);
    F sum[G][VECTORS][2];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            for (int odd = 0; odd < 2; ++odd) sum[g][v][odd] = load(sums + g * row + (2 * v + odd) * LANES);
    const auto add = [&](int64_t t, bool two) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            const uint16_t *value = values + t * a.dim + v * PAIRED, *after = value + a.dim;
            const I one = pairs(value, width - v * PAIRED), next = two ? pairs(after, width - v * PAIRED) : splat(0);
            __builtin_prefetch(value + later);
            __builtin_prefetch(after + later);
            const I low = splat(0xffff), even = (one & low) | (next << 16), odd = ((one >> 16) & low) | without(next, low);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                const I weight = splat32(weights + g * SPAN + t);
                sum[g][v][0] = add_pairs(sum[g][v][0], even, weight);
                sum[g][v][1] = add_pairs(sum[g][v][1], odd, weight);
            }
        }
    };
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) add(t, true);
    if (t < n) add(t, false);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            for (int odd = 0; odd < 2; ++odd) store(sums + g * row + (2 * v + odd) * LANES, sum[g][v][odd]);
}

// Values weighed by the scores of G queries.
template <int G>
void values_of(const AttendArgs& a, const uint16_t* weights, float* out) {
    constexpr int VECTORS = REGISTER_BYTES == 64 ? 2 : 1;
    alignas(64) float sums[G * qkit::MOST_DIM];
    const int64_t row = (a.dim + PAIRED - 1) / PAIRED * PAIRED;
    std::memset(sums, 0, (size_t)(G * row) * sizeof(float));
    for (int64_t t = 0; t < a.n; t += NEAR) {
        const int64_t n = a.n - t < NEAR ? a.n - t : NEAR;
        int64_t d = 0;
        for (; d + VECTORS * PAIRED <= a.dim; d += VECTORS * PAIRED)
            add_weighed<G, VECTORS>(a, a.values + t * a.dim + d, VECTORS * PAIRED, n, weights + t, sums + d, row);
        for (; d < a.dim; d += PAIRED)
            add_weighed<G, 1>(a, a.values + t * a.dim + d, a.dim - d, n, weights + t, sums + d, row);
    }
    for (int g = 0; g < G; ++g)
        for (int64_t d = 0; d < a.dim; d += PAIRED) {
            F low, high;
            zip(load(sums + g * row + d), load(sums + g * row + d + LANES), low, high);
            store_part<F32>(out + g * a.dim + d, low, a.dim - d);
            if (d + LANES < a.dim) store_part<F32>(out + g * a.dim + d + LANES, high, a.dim - d - LANES);
        }
}

template <int G>
void attend_some(const AttendArgs& a, int64_t first) {
    alignas(64) float scores[G * SPAN];
    alignas(64) uint16_t weights[G * SPAN];
    scores_of<G>(a, a.q + first * a.dim, scores);
    for (int g = 0; g < G; ++g)
        softmax(scores + g * SPAN, a.n, weights + g * SPAN, a.most[first + g], a.total[first + g]);
    values_of<G>(a, weights, a.out + first * a.dim);
}

void step_attend(const AttendArgs& a) {
    int64_t g = 0;
    while (const int64_t left = a.group - g) {
        const int64_t passes = (left + 3) / 4, now = (left + passes - 1) / passes;  // as even as can be
        (now == 4 ? attend_some<4> : now == 3 ? attend_some<3> : now == 2 ? attend_some<2> : attend_some<1>)(a, g);
        g += now;
    }
}

}  // namespace
