"""x @ dequantized(weight).T for one row and integer weights, without matrix units.

A code becomes a float32 by one LOP3 that places its bits in the mantissa under a fixed exponent; what that adds is the
same for every output, so it is subtracted once a thread, times the inputs, and not once a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import and_or, wide
from .gemm import epilogue


@triton.jit
def widened(w, i: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Code i of each word as float32, plus `added(i)`."""
    if BITS == 4:
        # Nibbles 3 and 4 lie in the upper mantissa where they are, each other pair after one shift.
        shift: tl.constexpr = 16 if i == 0 else 8 if i < 3 else 0 if i < 5 else -8 if i < 7 else -16
        v = (w << shift) if shift >= 0 else (w >> -shift)
        if i == 3 or i == 1 or i == 5 or i == 7:
            v = and_or(v, 0x0000F000, 0x45000000, ASM)
        else:
            v = and_or(v, 0x000F0000, 0x43000000, ASM)
    else:
        shift8: tl.constexpr = 15 - 8 * i
        v = (w << shift8) if shift8 >= 0 else (w >> -shift8)
        v = and_or(v, 0x007F8000, 0x43800000, ASM)
    return v.to(tl.float32, bitcast=True)


@triton.jit
def added(i: tl.constexpr, BITS: tl.constexpr):
    if BITS == 8:
        return 256.0
    return 2048.0 if i == 1 or i == 3 or i == 5 or i == 7 else 128.0


@triton.jit
def gemv_kernel(
    x, words, scale, zero, row, bias, y, partial, M, N, K, PADDED_N,
    BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [1, K] -> y [1, N], or the partial sums of one of SPLIT parts -> partial [SPLIT, 1, PADDED_N]. M is 1."""
    PLANE: tl.constexpr = 2 * WORDS
    PLANES: tl.constexpr = 16 // BITS
    BLOCK: tl.constexpr = PLANE * PLANES
    BY_BLOCK: tl.constexpr = GROUP % BLOCK == 0  # so also where a row has one scale
    MIDDLE: tl.constexpr = 0.0 if ZERO else float(1 << (BITS - 1))
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, WORDS)
    blocks = (K + BLOCK - 1) // BLOCK
    share = (blocks + SPLIT - 1) // SPLIT
    first = tl.program_id(2) * share
    wp = words + first.to(tl.int64) * (PADDED_N * WORDS) + rn[:, None] * WORDS + r[None, :]
    acc = tl.zeros([BN, WORDS], tl.float32)
    for b in tl.range(first, tl.minimum(first + share, blocks)):
        w = tl.load(wp)
        g = 0
        s = 1.0
        z = 0.0
        less = tl.zeros([1, WORDS], tl.float32)
        total = tl.zeros([1, WORDS], tl.float32)
        t = tl.zeros([BN, WORDS], tl.float32)
        for j in tl.static_range(PLANES):
            k = b * BLOCK + j * PLANE + tl.arange(0, PLANE)
            if EVEN_K:  # noqa: SIM108
                xj = tl.load(x + k)
            else:
                xj = tl.load(x + k, mask=k < K, other=0.0)
            x0, x1 = tl.split(tl.reshape(wide(xj), [WORDS, 2]))
            x0 = x0[None, :]
            x1 = x1[None, :]
            t += widened(w, j, BITS, ASM) * x0
            t += widened(w, j + PLANES, BITS, ASM) * x1
            less += x0 * (added(j, BITS) + MIDDLE) + x1 * (added(j + PLANES, BITS) + MIDDLE)
            total += x0 + x1
            if not BY_BLOCK or j == PLANES - 1:
                if GROUP > 0:
                    g = (b * BLOCK + j * PLANE) // GROUP
                    s = tl.load(scale + g * PADDED_N + rn).to(tl.float32)[:, None]
                t -= less
                if ZERO:
                    z = tl.load(zero + g * PADDED_N + rn).to(tl.int32) | 0x4B000000
                    t -= (z.to(tl.float32, bitcast=True) - 8388608.0)[:, None] * total
                acc += t * s
                t = tl.zeros([BN, WORDS], tl.float32)
                less = tl.zeros([1, WORDS], tl.float32)
                total = tl.zeros([1, WORDS], tl.float32)
        wp += PADDED_N * WORDS
    out = tl.sum(acc, 1)
    if SPLIT > 1:
        tl.store(partial + tl.program_id(2) * PADDED_N + rn, out)
    else:
        epilogue(out[:, None], rn, tl.arange(0, 1), row, bias, y, M, N, 1.0, BIAS, PAIRED)
