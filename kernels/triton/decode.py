"""Device functions that turn words of the layout into operands: a few bit operations a pair, no int-to-float conversion.

Every kernel shares them. The bits of a code become the low mantissa bits of a float with a fixed exponent ("magic"):
float16 0x6400 | q is 1024 + q, bfloat16 0x4300 | q is 128 + q for q < 128; the difference to the zero point is exact in
both. Floats of four and eight bits are moved to their place in a 16-bit float and are then off by a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(v, DTYPE: tl.constexpr):
    """int32 [n, words] -> [n, 2 * words]: the low and the high 16 bits of each word as neighbouring DTYPE values."""
    lo = v.to(tl.int16).to(DTYPE, bitcast=True)
    hi = (v >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(lo, hi), [v.shape[0], 2 * v.shape[1]])


@triton.jit
def offset(KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What `plane` has added to an integer code: 1024, or 128 in bfloat16 (8 bits: -128, the code's sign flipped)."""
    if DTYPE == tl.float16:
        return 1024.0
    return 128.0 if BITS == 4 else -128.0


@triton.jit
def factor(KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What a value of `plane` must still be multiplied by: 1 but for the small floats, which keep their exponent."""
    if KIND == "mxfp4" or KIND == "nvfp4":
        return 2.0**14 if DTYPE == tl.float16 else 2.0**126
    elif KIND == "fp8":
        return 2.0**8 if DTYPE == tl.float16 else 2.0**120
    return 1.0


@triton.jit
def plane(w, table, magic, j: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Plane j of a tile of words, int32 [n, words] -> DTYPE [n, 2 * words].

    "int": code + `offset`; nf4, fp4: the value; the others: the value over `factor`.
    table: pointer to the 256 pairs of DTYPE. magic: see `magic_of`; a run-time argument, because one LOP3 does
    `w & mask | magic` only where one of the two is not an immediate.
    """
    if KIND == "nf4" or KIND == "fp4":
        v = tl.load(table + ((w >> (8 * j)) & 0xFF))
    elif KIND == "mxfp4" or KIND == "nvfp4":  # s, e e m -> the top of the exponent's low bits and of the mantissa
        up: tl.constexpr = 9 if DTYPE == tl.float16 else 6
        low: tl.constexpr = 0x00070007 << up
        at: tl.constexpr = up - 4 * j
        m = (w << at) if at >= 0 else (w >> -at)
        v = (m & low) | ((w << (12 - 4 * j)) & magic)
    elif KIND == "fp8":
        down: tl.constexpr = (1 if DTYPE == tl.float16 else 4)
        s = (w << 8) if j == 0 else w
        v = ((s >> down) & (0x7F007F00 >> down)) | (s & magic)
    elif BITS == 4:
        v = ((w >> (4 * j)) & 0x000F000F) | magic
    elif DTYPE == tl.float16:
        v = ((w >> (8 * j)) & 0x00FF00FF) | magic
    else:
        # 128 + the low seven bits, less 256 or, where the top bit is set, 128: code - 128, exact in eight bits.
        s = w >> (8 * j)
        big = halves((s & 0x00800080) ^ 0x43804380, DTYPE)
        return halves((s & 0x007F007F) | magic, DTYPE) - big
    return halves(v, DTYPE)
