"""Packed weights back to a plain matrix: for products so large that the BLAS library wins, and for gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .planes import factor, narrow, plane, scale_value, wide, zero_pair


@triton.jit
def dequantize_kernel(
    words, scale, zero, row, table, y, N, K, PADDED_N,
    KIND: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of BN rows -> y [N, K], each weight rounded once."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    PLANE: tl.constexpr = 2 * WORDS
    PLANES: tl.constexpr = 16 // BITS
    BLOCK: tl.constexpr = PLANE * PLANES
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    r = tl.arange(0, WORDS)
    if KIND == "nf4" or KIND == "fp4":
        table += 0 if DTYPE == tl.float16 else 256
    w = tl.load(words + b.to(tl.int64) * (PADDED_N * WORDS) + rn[:, None] * WORDS + r[None, :])
    by_row = tl.load(row + rn)[:, None]
    for j in tl.static_range(PLANES):
        k = b * BLOCK + j * PLANE + tl.arange(0, PLANE)
        g = 0 if GROUP == 0 else (b * BLOCK + j * PLANE) // GROUP
        z2 = 0
        if ZERO:
            z2 = zero_pair(tl.load(zero + g * PADDED_N + rn)[:, None], BITS, DTYPE)
        s = by_row
        if GROUP > 0:
            s = by_row * scale_value(tl.load(scale + g * PADDED_N + rn), KIND)[:, None]
        v = wide(plane(w, z2, 0, table, j, KIND, BITS, DTYPE, ZERO, False, ASM)) * factor(KIND, DTYPE) * s
        mask = (rn < N)[:, None] & (k < K)[None, :]
        tl.store(y + rn.to(tl.int64)[:, None] * K + k[None, :], narrow(v, DTYPE), mask=mask)
