"""Device functions that turn words of the layout into operands by a few bit operations a pair.

Every kernel shares them, and none converts integers to floats. The bits of a code become the low mantissa bits of a
float with a fixed exponent ("magic"):
float16 0x6400 | q is 1024 + q, bfloat16 0x4300 | q is 128 + q; subtracting the zero point is then exact in either.
Floats of four and eight bits are moved to their place in a 16-bit float and are then off by a power of two.

Two 16-bit values stay in one 32-bit register until the dot. ASM says whether PTX may be written for that: left to
itself ptxas splits the pairs and puts them together again. Elsewhere (AMD, the interpreter) plain Triton does the same.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as integers: it neither adds nor multiplies them, and it rounds towards zero.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def halves(v, DTYPE: tl.constexpr):
    """int32 [n, words] -> [n, 2 * words]: the low and the high 16 bits of each word as neighbouring DTYPE values."""
    lo = v.to(tl.int16).to(DTYPE, bitcast=True)
    hi = (v >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(lo, hi), [v.shape[0], 2 * v.shape[1]])


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        r = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        r = v.to(DTYPE)
    return r


@triton.jit
def wide(v):
    """float16 or bfloat16 -> float32; subnormal bfloat16 too, which the interpreter's own conversion loses."""
    if v.dtype == tl.bfloat16:
        r = (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        r = v.to(tl.float32)
    return r


@triton.jit
def dot(a, b, acc):
    """tl.dot."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # noqa: SIM108
        r = tl.dot(wide(a), wide(b), acc)
    else:
        r = tl.dot(a, b, acc)
    return r


@triton.jit
def twice(v, DTYPE: tl.constexpr):
    """A float32 in both halves of an int32: the form in which `plane` takes zeros and scales."""
    bits = narrow(v, DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def and_or(w, mask: tl.constexpr, magic: tl.constexpr, ASM: tl.constexpr):
    """w & mask | magic: one LOP3 (from separate operations ptxas makes two, both constants being immediates)."""
    if ASM:
        constants = tl.full([1, 1], mask, tl.int32), tl.full([1, 1], magic, tl.int32)
        r = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [w, constants[0], constants[1]], tl.int32, True, 1
        )
    else:
        r = (w & mask) | magic
    return r


@triton.jit
def pairs(v, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words as `sub` and `mul` take them: pairs in int32 with ASM, else values already apart (bfloat16 as float32)."""
    if ASM:
        r = v
    elif DTYPE == tl.bfloat16:
        r = wide(halves(v, DTYPE))
    else:
        r = halves(v, DTYPE)
    return r


@triton.jit
def apart(v, DTYPE: tl.constexpr, ASM: tl.constexpr, EXACT: tl.constexpr):
    """What `pairs` gave -> DTYPE [n, 2 * words]. EXACT: DTYPE holds the values, so there is nothing to round."""
    if ASM:
        r = halves(v, DTYPE)
    elif DTYPE == tl.bfloat16 and EXACT:
        r = (v.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    elif DTYPE == tl.bfloat16:
        r = narrow(v, DTYPE)
    else:
        r = v
    return r


@triton.jit
def low(v, DTYPE: tl.constexpr):
    """The value of two equal halves, for values that are apart."""
    r = v.to(tl.int16).to(DTYPE, bitcast=True)
    if DTYPE == tl.bfloat16:
        r = wide(r)
    return r


@triton.jit
def sub(a, b, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """a - b; a and b from `pairs`, or b two equal halves of int32 [n or 1, 1]. fma in bfloat16: sm_80 has no other."""
    if ASM:
        if DTYPE == tl.float16:
            r = tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
        else:
            minus_one = tl.full([1, 1], -0x407F4080, tl.int32)  # 0xBF80BF80
            r = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $2, $3, $1;", "=r,r,r,r", [a, b, minus_one], tl.int32, True, 1
            )
    elif b.dtype == tl.int32:
        r = a - low(b, DTYPE)
    else:
        r = a - b
    return r


@triton.jit
def mul(a, b, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """a * b; a from `pairs`, b two equal halves of int32 [n or 1, 1]."""
    if ASM:
        if DTYPE == tl.float16:
            r = tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
        else:
            minus_zero = tl.full([1, 1], -0x7FFF8000, tl.int32)  # 0x80008000
            r = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, minus_zero], tl.int32, True, 1
            )
    else:
        r = a * low(b, DTYPE)
    return r


@triton.jit
def sign_or(s, rest, ASM: tl.constexpr):
    """s & 0x80008000 | rest."""
    if ASM:
        sign = tl.full([1, 1], -0x7FFF8000, tl.int32)
        r = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [s, sign, rest], tl.int32, True, 1)
    else:
        r = (s & -0x7FFF8000) | rest
    return r


@triton.jit
def zero_pair(z, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 zero points -> what `plane` must subtract, in both halves of an int32. No int-to-float conversion."""
    q = z.to(tl.int32)
    if DTYPE == tl.float16:
        return (q | 0x6400) * 0x10001
    if BITS == 4:
        return (q | 0x4300) * 0x10001
    # z - 128, as `plane` does it.
    return twice(low((q & 0x7F) | 0x4300, DTYPE) - low((q & 0x80) ^ 0x4380, DTYPE), DTYPE)


@triton.jit
def scale_value(s, KIND: tl.constexpr):
    """Scales as stored -> float32. e8m0 and e4m3 become float32 by moving their bits."""
    if KIND == "mxfp4":
        return (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif KIND == "nvfp4":
        q = s.to(tl.int32)
        return (((q & 0x7F) << 20) | ((q & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
    return s.to(tl.float32)


@triton.constexpr_function
def factor(KIND, DTYPE):
    """What a value of `plane` must still be multiplied by: 1 but for the small floats, which keep their exponents."""
    if KIND == "mxfp4" or KIND == "nvfp4":
        return 2.0**14 if DTYPE == tl.float16 else 2.0**126
    elif KIND == "fp8":
        return 2.0**8 if DTYPE == tl.float16 else 2.0**120
    return 1.0


@triton.jit
def plane(
    w, zero2, scale2, table, j: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ZERO: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr, UNDO: tl.constexpr = False,
):  # fmt: skip
    """Plane j of a tile of words, int32 [n, words] -> DTYPE [n, 2 * words].

    KIND "int": (code - zero) * scale; nf4, fp4: value * scale; the others: value / factor * scale.
    zero2   int32 [n, 1] from `zero_pair`, read where ZERO (otherwise the zero point is 2**(BITS-1))
    scale2  int32 [n, 1] from `twice`, read where SCALE
    table   pointer to the 256 pairs of DTYPE, read for nf4 and fp4
    UNDO    multiply by `factor` (bfloat16 only, where the value over its factor is subnormal)
    """
    if KIND == "nf4" or KIND == "fp4":
        v = tl.load(table + ((w >> (8 * j)) & 0xFF))
    elif KIND == "mxfp4" or KIND == "nvfp4":  # s, e e m: to the low bits of the exponent and the top of the mantissa
        left: tl.constexpr = 9 if DTYPE == tl.float16 else 6
        rest: tl.constexpr = 0x0E000E00 if DTYPE == tl.float16 else 0x01C001C0
        m = (w << (left - 4 * j)) if left >= 4 * j else (w >> (4 * j - left))
        v = sign_or(w << (12 - 4 * j), m & rest, ASM)
    elif KIND == "fp8":
        s = (w << 8) if j == 0 else w
        right: tl.constexpr = 1 if DTYPE == tl.float16 else 4
        kept: tl.constexpr = 0x3F803F80 if DTYPE == tl.float16 else 0x07F007F0
        v = sign_or(s, (s >> right) & kept, ASM)
    elif BITS == 4:
        v = and_or(w >> (4 * j), 0x000F000F, 0x64006400 if DTYPE == tl.float16 else 0x43004300, ASM)
    elif DTYPE == tl.float16:
        v = and_or(w >> (8 * j), 0x00FF00FF, 0x64006400, ASM)
    else:
        # 128 + the low seven bits, less 256 or, where the top bit is set, 128: code - 128, exact in eight bits.
        v = and_or(w >> (8 * j), 0x007F007F, 0x43004300, ASM)
    v = pairs(v, DTYPE, ASM)
    if KIND == "int":
        if BITS == 8 and DTYPE == tl.bfloat16:
            v = sub(v, pairs(((w >> (8 * j)) & 0x00800080) ^ 0x43804380, DTYPE, ASM), DTYPE, ASM)
            if ZERO:
                v = sub(v, zero2, DTYPE, ASM)
        elif ZERO:
            v = sub(v, zero2, DTYPE, ASM)
        elif DTYPE == tl.bfloat16:
            v = sub(v, tl.full([1, 1], 0x43084308, tl.int32), DTYPE, ASM)
        else:
            v = sub(v, tl.full([1, 1], 0x64086408 if BITS == 4 else 0x64806480, tl.int32), DTYPE, ASM)
    if SCALE:
        v = mul(v, scale2, DTYPE, ASM)
    elif UNDO:  # bfloat16 2**126 and 2**120
        both: tl.constexpr = 0x7B807B80 if KIND == "fp8" else 0x7E807E80
        v = mul(v, tl.full([1, 1], both, tl.int32), DTYPE, ASM)
    return apart(v, DTYPE, ASM, not SCALE)
