"""Dynamic per-token quantization of activations, one pass over each row: absmax, scale, codes, sum of the codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .planes import wide

# A row up to this many values stays in registers between the absmax and the codes; a longer one is read twice.
_AT_ONCE = 8192
KINDS = ("int8", "fp8", "fp8 as half")
_NOT_FINITE = tl.constexpr(0x7F800000)  # the least magnitude of a float32 that is infinite or NaN


@triton.jit
def _magnitude(t):
    """The bits of |t|. They order as the numbers do, with infinity above all and NaN, which a maximum of floats may
    lose, above that."""
    return t.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(absmax, LARGEST: tl.constexpr):
    """absmax (its bits) / LARGEST, 1 for 0. NaN where a value of the row is NaN or infinite: so are its products."""
    s = tl.div_rn(absmax.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(absmax < _NOT_FINITE, tl.where(s == 0.0, 1.0, s), float("nan"))


@triton.jit
def _codes(t, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """Rounded to nearest even: int8 codes, e4m3 codes, or the e4m3 values as float16. t float32."""
    t = tl.minimum(tl.maximum(t, -LARGEST), LARGEST)  # more only where the scale is so small that it was rounded
    bits = t.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # e4m3 keeps three bits of the significand; below 2**-6 its step is 2**-9, which 1.5 * 2**14 rounds to.
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) & -0x100000
    a = size.to(tl.float32, bitcast=True)
    small = (a + 24576.0) - 24576.0
    if KIND == "int8":
        # Adding 1.5 * 2**23 leaves the integer in the low bits of the significand.
        code = ((t + 12582912.0) - 12582912.0).to(tl.int8)
    elif KIND == "fp8":
        code = tl.where(a < 0.015625, (small * 512.0).to(tl.int32), (normal >> 20) - (120 << 3))
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        value = tl.where(a < 0.015625, small, normal.to(tl.float32, bitcast=True))
        code = tl.where(bits < 0, -value, value).to(tl.float16)
    return code


@triton.jit
def _quantize_rows(
    x, q, scale, sums, K, PADDED_K, stride, LARGEST: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x += row * stride
    q += row * PADDED_K
    if AT_ONCE:
        values = wide(tl.load(x + columns, mask=columns < K, other=0.0))
        s = _scale(tl.max(_magnitude(values)), LARGEST)
        code = _codes(tl.div_rn(values, s), LARGEST, KIND)
        tl.store(q + columns, code, mask=columns < PADDED_K)
        total = tl.sum(code.to(tl.int32)) if KIND == "int8" else 0
    else:
        seen = tl.zeros([BLOCK], tl.int32)
        for k in range(0, K, BLOCK):
            values = wide(tl.load(x + k + columns, mask=k + columns < K, other=0.0))
            seen = tl.maximum(seen, _magnitude(values))
        s = _scale(tl.max(seen), LARGEST)
        part = tl.zeros([BLOCK], tl.int32)
        for k in range(0, PADDED_K, BLOCK):
            values = wide(tl.load(x + k + columns, mask=k + columns < K, other=0.0))
            code = _codes(tl.div_rn(values, s), LARGEST, KIND)
            tl.store(q + k + columns, code, mask=k + columns < PADDED_K)
            if KIND == "int8":
                part += code.to(tl.int32)
        total = tl.sum(part)
    tl.store(scale + row, s)
    if KIND == "int8":
        tl.store(sums + row, total)


def quantize_rows(x: torch.Tensor, kind: str, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, in], last dimension contiguous -> codes [rows, padded], scale float32 [rows], sums int32 [rows].

    kind  "int8": int8 codes, scale = absmax / 127, and `sums` is the sum of a row's codes. "fp8": float8_e4m3fn,
          scale = absmax / 448. "fp8 as half": the same values as float16, for cards without fp8 products.
    An all-zero row has scale 1; one that holds NaN or infinity has scale NaN, and any codes. Codes from `in` to
    `padded` are 0. The codes are those of `reference.quantize_activations`, bit for bit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    rows, width = x.shape
    if padded < width or (width and x.stride(1) != 1):
        raise ValueError(f"x has shape {(rows, width)} and strides {x.stride()}, to be padded to {padded}")
    dtype = {"int8": torch.int8, "fp8": torch.uint8, "fp8 as half": torch.float16}[kind]
    q = torch.empty(rows, padded, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = torch.empty(rows if kind == "int8" else 0, dtype=torch.int32, device=x.device)
    if rows:
        at_once = padded <= _AT_ONCE
        block = triton.next_power_of_2(padded) if at_once else 4096
        largest = 127.0 if kind == "int8" else 448.0
        warps = 4 if block <= 2048 else 8
        _quantize_rows[(rows,)](
            x, q, scale, sums, width, padded, x.stride(0), largest, kind, block, at_once, num_warps=warps
        )  # fmt: skip
    return q.view(torch.float8_e4m3fn) if kind == "fp8" else q, scale, sums
