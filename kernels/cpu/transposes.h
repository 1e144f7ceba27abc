// Sixteen vectors of sixteen lanes: rows become lanes, and back; the sum of each.
#pragma once
#include <utility>

#include "lanes.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// Lanes of a and b in turns, from lane FIRST on.
template <int FIRST, class V, int... i>
QK_INLINE V zip(V a, V b, std::integer_sequence<int, i...>) {
    constexpr int n = sizeof...(i);
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (FIRST + i / 2 + i % 2 * n)...);
#else
    typedef decltype(a == b) Mask;
    return __builtin_shuffle(a, b, Mask{(FIRST + i / 2 + i % 2 * n)...});
#endif
}
QK_INLINE void zip(Bytes a, Bytes b, Bytes& low, Bytes& high) {
    const auto each = std::make_integer_sequence<int, LANES>();
    low = zip<0>(a, b, each), high = zip<LANES / 2>(a, b, each);
}
QK_INLINE void zip(F a, F b, F& low, F& high) {
    const auto each = std::make_integer_sequence<int, WIDTH>();
    RawF both[2 * PARTS];
    QK_EACH both[2 * p] = zip<0>(a.v[p], b.v[p], each), both[2 * p + 1] = zip<WIDTH / 2>(a.v[p], b.v[p], each);
    QK_EACH low.v[p] = both[p], high.v[p] = both[PARTS + p];
}
// x[i] lane j <-> x[j] lane i. Each round moves the first bit of the row's number behind the column's.
template <class V>
QK_INLINE void transpose(V (&x)[LANES]) {
    for (int round = 0; round < 4; ++round) {
        V y[LANES];
        for (int i = 0; i < LANES / 2; ++i) zip(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
        for (int i = 0; i < LANES; ++i) x[i] = y[i];
    }
}
// Lane i: the sum over the lanes of x[i], which is lost.
QK_INLINE F totals(F (&x)[LANES]) {
    const auto half = [&](int n) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            F low, high;
            zip(x[i], x[i + n], low, high);
            x[i] = low + high;
        }
    };
    half(8), half(4), half(2), half(1);
    return x[0];
}

}  // namespace
