"""x @ dequantized(weight).T on matrix units: one kernel for one row to thousands, with or without split K.

The product is computed transposed, [outputs, tokens]: decoded weights are the left operand, which every matrix unit
takes from registers, so they never pass through shared memory again, and eight tokens fill an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .planes import dot, factor, narrow, plane, scale_value, twice, wide, zero_pair


@triton.jit
def epilogue(acc, rn, rm, row, bias, y, M, N, LATE: tl.constexpr, BIAS: tl.constexpr):
    """acc [BN, BM] * row * LATE + bias, to y [M, N]."""
    v = acc * (tl.load(row + rn) * LATE)[:, None]
    if BIAS:
        v += wide(tl.load(bias + rn, mask=rn < N, other=0.0))[:, None]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm.to(tl.int64)[:, None] * N + rn[None, :], narrow(tl.trans(v), y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x, words, scale, zero, row, table, bias, y, partial, M, N, K, PADDED_N, STRIDE_X,
    KIND: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr, SCALE_SUM: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [M, K] (rows STRIDE_X apart) -> y [M, N], or the partial sums of one of SPLIT parts -> partial [SPLIT, M, N].

    GROUP      inputs a scale, 0: none but the row's
    SCALE_SUM  scale the sums of a group rather than every weight: cheaper while there are few tokens
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLANE: tl.constexpr = 2 * WORDS
    PLANES: tl.constexpr = 16 // BITS
    BLOCK: tl.constexpr = PLANE * PLANES
    SMALL: tl.constexpr = KIND == "mxfp4" or KIND == "nvfp4" or KIND == "fp8"
    # nvfp4's scales reach 448: kept small beside the factor, and what is left out multiplies the sum.
    SPARE: tl.constexpr = 2.0**9 if KIND == "nvfp4" and GROUP > 0 and not SCALE_SUM else 1.0
    WEIGHT_SCALE: tl.constexpr = GROUP > 0 and not SCALE_SUM
    # A float16 operand may stay off by its factor until the end, a bfloat16 one would be subnormal.
    UNDO: tl.constexpr = SMALL and not WEIGHT_SCALE and DTYPE == tl.bfloat16
    FACTOR: tl.constexpr = factor(KIND, DTYPE)
    LATE: tl.constexpr = SPARE if (WEIGHT_SCALE or UNDO or not SMALL) else FACTOR
    BY_BLOCK: tl.constexpr = GROUP % BLOCK == 0

    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    blocks = (K + BLOCK - 1) // BLOCK
    share = (blocks + SPLIT - 1) // SPLIT
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, blocks)
    rp = tl.arange(0, PLANE)
    wp = words + first.to(tl.int64) * (PADDED_N * WORDS) + rn[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    xp = x + (rm % M).to(tl.int64)[:, None] * STRIDE_X + rp[None, :] + first * BLOCK
    if KIND == "nf4" or KIND == "fp4":
        table += 0 if DTYPE == tl.float16 else 256

    acc = tl.zeros([BN, BM], tl.float32)
    for b in tl.range(first, last):
        w = tl.load(wp)
        z2 = 0
        s2 = tl.full([1, 1], 0, tl.int32)
        if GROUP > 0 and BY_BLOCK:
            g = b // (GROUP // BLOCK)
            s = scale_value(tl.load(scale + g * PADDED_N + rn), KIND)[:, None]
            if WEIGHT_SCALE:
                s2 = twice(s * (FACTOR / SPARE), DTYPE)
            if ZERO:
                z2 = zero_pair(tl.load(zero + g * PADDED_N + rn)[:, None], BITS, DTYPE)
            t = tl.zeros([BN, BM], tl.float32)
        if GROUP == 0 and ZERO:
            z2 = zero_pair(tl.load(zero + rn)[:, None], BITS, DTYPE)
        for j in tl.static_range(PLANES):
            if EVEN_K:
                xj = tl.load(xp + j * PLANE)
            else:
                xj = tl.load(xp + j * PLANE, mask=(b * BLOCK + j * PLANE + rp < K)[None, :], other=0.0)
            if GROUP > 0 and not BY_BLOCK:
                g = (b * BLOCK + j * PLANE) // GROUP if BLOCK % GROUP else b * (BLOCK // GROUP) + j * PLANE // GROUP
                s = scale_value(tl.load(scale + g * PADDED_N + rn), KIND)[:, None]
                if WEIGHT_SCALE:
                    s2 = twice(s * (FACTOR / SPARE), DTYPE)
                if ZERO:
                    z2 = zero_pair(tl.load(zero + g * PADDED_N + rn)[:, None], BITS, DTYPE)
            v = plane(w, z2, s2, table, j, KIND, BITS, DTYPE, ZERO, WEIGHT_SCALE, ASM, UNDO)
            if GROUP > 0 and SCALE_SUM:
                if BY_BLOCK:
                    t = dot(v, tl.trans(xj), t)
                else:
                    acc += dot(v, tl.trans(xj), tl.zeros([BN, BM], tl.float32)) * s
            else:
                acc = dot(v, tl.trans(xj), acc)
        if GROUP > 0 and SCALE_SUM and BY_BLOCK:
            acc += t * s
        wp += PADDED_N * WORDS
        xp += BLOCK

    if SPLIT > 1:
        p = partial + (tl.program_id(2) * M + rm).to(tl.int64)[:, None] * PADDED_N + rn[None, :]
        tl.store(p, tl.trans(acc * LATE), mask=(rm < M)[:, None])
    else:
        epilogue(acc, rn, rm, row, bias, y, M, N, LATE, BIAS)


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial, row, bias, y, M, N, PADDED_N, SPLIT: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """partial [SPLIT, M, PADDED_N] -> y [M, N]: always in the same order, so results repeat bit by bit."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) + tl.arange(0, 1)
    acc = tl.zeros([BN, 1], tl.float32)
    for s in tl.static_range(SPLIT):
        part = partial + (s * M + rm).to(tl.int64)[None, :] * PADDED_N + rn[:, None]
        acc += tl.load(part, mask=(rn < N)[:, None], other=0.0)
    epilogue(acc, rn, rm, row, bias, y, M, N, 1.0, BIAS)
