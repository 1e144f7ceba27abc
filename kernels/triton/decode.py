"""Device functions that turn words of the layout into operands: a few bit operations a pair, no int-to-float conversion.

Every kernel shares them. The bits of a code become the low mantissa bits of a float with a fixed exponent ("magic"):
float16 0x6400 | q is 1024 + q, bfloat16 0x4300 | q is 128 + q; subtracting the zero point is then exact in either.
Floats of four and eight bits are moved to their place in a 16-bit float and are then off by a power of two.

Two 16-bit values stay in one 32-bit register until the dot. ASM says whether PTX may be written for that: left to
itself ptxas splits the pairs and puts them together again. Elsewhere (AMD, the interpreter) plain Triton does the same.
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
def twice(v, DTYPE: tl.constexpr):
    """A value in both halves of an int32: the form in which `plane` takes zeros and scales."""
    bits = v.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def and_or(w, mask: tl.constexpr, magic: tl.constexpr, ASM: tl.constexpr):
    """w & mask | magic: one LOP3 (from separate operations ptxas makes two, both constants being immediates)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [w, tl.full([1, 1], mask, tl.int32), tl.full([1, 1], magic, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return (w & mask) | magic


@triton.jit
def sub2(a, b, DTYPE: tl.constexpr):
    """a - b on pairs. fma for bfloat16: sm_80 has no other."""
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $2, $3, $1;",
        "=r,r,r,r",
        [a, b, tl.full([1, 1], -0x407F4080, tl.int32)],  # 0xBF80BF80: -1, -1
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def mul2(a, b, DTYPE: tl.constexpr):
    """a * b on pairs."""
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a, b, tl.full([1, 1], -0x7FFF8000, tl.int32)],  # 0x80008000: -0, -0
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def less(v, zero2, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs [n, words] - zero2 [n or 1, 1 or words] -> DTYPE pairs as int32 (ASM) or as [n, 2 * words] values."""
    if ASM:
        return sub2(v, zero2, DTYPE)
    return halves(v, DTYPE) - zero2.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def times(v, scale2, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """As `less`, times scale2; without ASM v is already split into values."""
    if ASM:
        return mul2(v, scale2, DTYPE)
    return v * scale2.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def split_values(v, DTYPE: tl.constexpr, ASM: tl.constexpr):
    return v if not ASM else halves(v, DTYPE)


@triton.jit
def zero_pair(z, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 zero points -> what `plane` must subtract, in both halves of an int32. No int-to-float conversion."""
    q = z.to(tl.int32)
    if DTYPE == tl.float16:
        return (q | 0x6400) * 0x10001
    if BITS == 4:
        return (q | 0x4300) * 0x10001
    # z - 128, as `plane` does it.
    low = ((q & 0x7F) | 0x4300).to(tl.int16).to(DTYPE, bitcast=True)
    return twice(low - ((q & 0x80) ^ 0x4380).to(tl.int16).to(DTYPE, bitcast=True), DTYPE)


@triton.jit
def scale_value(s, KIND: tl.constexpr):
    """Scales as stored -> float32. e8m0 and e4m3 become float32 by moving their bits."""
    if KIND == "mxfp4":
        return (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif KIND == "nvfp4":
        q = s.to(tl.int32)
        return (((q & 0x7F) << 20) | ((q & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
    return s.to(tl.float32)


@triton.jit
def factor(KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What a value of `plane` must still be multiplied by: 1 but for the small floats, which keep their exponents."""
    if KIND == "mxfp4" or KIND == "nvfp4":
        return 2.0**14 if DTYPE == tl.float16 else 2.0**126
    elif KIND == "fp8":
        return 2.0**8 if DTYPE == tl.float16 else 2.0**120
    return 1.0


@triton.jit
def plane(
    w, zero2, scale2, table, j: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ZERO: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Plane j of a tile of words, int32 [n, words] -> DTYPE [n, 2 * words].

    KIND "int": (code - zero) * scale; nf4, fp4: value * scale; the others: value / factor * scale.
    zero2   int32 [n, 1] from `zero_pair`, read where ZERO (otherwise the zero point is 2**(BITS-1))
    scale2  int32 [n, 1] from `twice`, read where SCALE
    table   pointer to the 256 pairs of DTYPE, read for nf4 and fp4
    """
    if KIND == "nf4" or KIND == "fp4":
        v = tl.load(table + ((w >> (8 * j)) & 0xFF))
    elif KIND == "mxfp4" or KIND == "nvfp4":  # s, e e m: to the low bits of the exponent and the top of the mantissa
        up: tl.constexpr = 9 if DTYPE == tl.float16 else 6
        low: tl.constexpr = 0x0E000E00 if DTYPE == tl.float16 else 0x01C001C0
        m = (w << (up - 4 * j)) if up >= 4 * j else (w >> (4 * j - up))
        v = sign_or(w << (12 - 4 * j), m & low, ASM)
    elif KIND == "fp8":
        s = (w << 8) if j == 0 else w
        down: tl.constexpr = 1 if DTYPE == tl.float16 else 4
        low: tl.constexpr = 0x3F803F80 if DTYPE == tl.float16 else 0x07F007F0
        v = sign_or(s, (s >> down) & low, ASM)
    elif BITS == 4:
        v = and_or(w >> (4 * j), 0x000F000F, 0x64006400 if DTYPE == tl.float16 else 0x43004300, ASM)
    elif DTYPE == tl.float16:
        v = and_or(w >> (8 * j), 0x00FF00FF, 0x64006400, ASM)
    else:
        # 128 + the low seven bits, less 256 or, where the top bit is set, 128: code - 128, exact in eight bits.
        s = w >> (8 * j)
        v = and_or(s, 0x007F007F, 0x43004300, ASM)
        top = (s & 0x00800080) ^ 0x43804380
        if ASM:
            v = sub2(v, top, DTYPE)
        else:
            v = halves(v, DTYPE) - halves(top, DTYPE)
    split: tl.constexpr = KIND == "int" and BITS == 8 and DTYPE == tl.bfloat16
    if KIND == "int":
        if split:
            if ZERO:
                if ASM:
                    v = sub2(v, zero2, DTYPE)
                else:
                    v = v - zero2.to(tl.int16).to(DTYPE, bitcast=True)
        elif ZERO:
            v = less(v, zero2, DTYPE, ASM)
        else:
            middle: tl.constexpr = (
                (0x64086408 if BITS == 4 else 0x64806480) if DTYPE == tl.float16 else 0x43084308
            )
            v = less(v, tl.full([1, 1], middle, tl.int32), DTYPE, ASM)
    elif not ASM:
        v = halves(v, DTYPE)
    if SCALE:
        v = times(v, scale2, DTYPE, ASM)
    return split_values(v, DTYPE, ASM)


@triton.jit
def sign_or(s, low, ASM: tl.constexpr):
    """s & 0x80008000 | low."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [s, tl.full([1, 1], -0x7FFF8000, tl.int32), low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return (s & -0x7FFF8000) | low
