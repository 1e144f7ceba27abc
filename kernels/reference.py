"""The torch oracle every kernel is tested against, and the fallback where none fits. Simple beats fast here.

Layout shared by all kernels ("packed"): int32 [out, in * bits / 32], codes unsigned, low bits first. It is
byte for byte what compressed-tensors stores, and the transpose of what GPTQ stores.
"""

from __future__ import annotations

import torch

from .errors import NonFiniteError, ScaleOverflowError


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, ceil(n * bits / 32)], low bits first, zero padded. bits: 4 or 8."""
    per_word = 32 // bits
    rows, n = codes.shape
    words = -(-n // per_word)
    padded = torch.zeros(rows, words * per_word, dtype=torch.int32, device=codes.device)
    padded[:, :n] = codes
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return (padded.view(rows, words, per_word) << shifts).sum(dim=-1, dtype=torch.int32)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """int32 [rows, words] -> uint8 codes [rows, n]; the inverse of `pack`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.view(packed.shape[0], -1)[:, :n].to(torch.uint8)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """(codes - zero) * scale in float32, rounded once to `dtype`.

    codes uint8 [out, in]; scale [out, groups]; zero uint8 [out, groups] or None (2**(bits-1)).
    """
    out, in_ = codes.shape
    groups = scale.shape[1]
    w = codes.view(out, groups, in_ // groups).float()
    w = w - (float(1 << (bits - 1)) if zero is None else zero.float().unsqueeze(-1))
    return (w * scale.float().unsqueeze(-1)).view(out, in_).to(dtype)


def quantize(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Nearest code (ties to even) on a given grid: uint8 [out, in]. w float [out, in], scale/zero [out, groups]."""
    out, in_ = w.shape
    groups = scale.shape[1]
    q = torch.round(w.view(out, groups, in_ // groups).float() / scale.float().unsqueeze(-1))
    q = q + (float(1 << (bits - 1)) if zero is None else zero.float().unsqueeze(-1))
    return q.clamp_(0, (1 << bits) - 1).to(torch.uint8).view(out, in_)


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 scales rounded to their stored type; float16 by way of bfloat16 (engines read either)."""
    return scale.to(torch.bfloat16).to(torch.float16) if dtype == torch.float16 else scale.to(dtype)


def grid(
    w: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    multiplier: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The round-to-nearest grid of each group: scale [out, groups] in scale_dtype, zero uint8 or None (symmetric).

    symmetric   scale = (the weight of largest magnitude, signed; the positive one on a tie) / -(2**(bits-1)),
                so that this weight has a code of its own, 0
    asymmetric  with lo = min(0, w) and hi = max(0, w): scale = max((hi-lo)/max_code, hi/(max_code-min_zero)),
                zero = round(-lo/scale) in min_zero .. max_code
    A scale that is zero once stored (in bfloat16 and float32 also a subnormal one, which engines flush) is 1.
    multiplier (broadcastable to [out, groups]) stretches the scale before it is rounded: see rtn's clip search.
    Raises NonFiniteError and ScaleOverflowError.
    """
    out, in_ = w.shape
    grouped = w.float().view(out, groups, in_ // groups)
    if not torch.isfinite(grouped).all():
        raise NonFiniteError("the weight contains NaN or infinity")
    hi = grouped.amax(-1).clamp_(min=0)
    lo = grouped.amin(-1).clamp_(max=0)
    max_code = (1 << bits) - 1
    if symmetric:
        exact = torch.where(hi >= -lo, hi, lo) / -float(1 << (bits - 1))
    else:
        exact = torch.maximum((hi - lo) / max_code, hi / (max_code - min_zero))
    scale = round_scale(exact * multiplier, scale_dtype)
    if not torch.isfinite(scale).all():
        raise ScaleOverflowError("a scale overflows its stored type")
    least = 2.0**-24 if scale_dtype == torch.float16 else 2.0**-126
    scale = torch.where(scale.float().abs() < least, 1.0, scale.float()).to(scale_dtype)
    if symmetric:
        return scale, None
    zero = torch.round(-lo / scale.float()).clamp_(min_zero, max_code).to(torch.uint8)
    return scale, zero


# Rows are taken in chunks of about this many weights: the float32 temporaries stay near 1 GB at worst.
_CHUNK = 1 << 24


def quantize_rtn(
    w: torch.Tensor, bits: int, groups: int, symmetric: bool, scale_dtype: torch.dtype, min_zero: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, float]:
    """Round to nearest on `grid`: codes, scale, zero, sum of squared errors, sum of squares."""
    parts = []
    sq_err = sq_norm = 0.0
    for rows in w.split(max(1, _CHUNK // max(1, w.shape[1]))):
        scale, zero = grid(rows, bits, groups, symmetric, scale_dtype, min_zero)
        codes = quantize(rows, scale, zero, bits)
        exact = rows.double()
        sq_norm += float(exact.square().sum())
        # The error is that of the grid; rounding (code - zero) * scale to a dtype belongs to whoever does it.
        error = exact - dequantize(codes, scale.double(), zero, bits, torch.float64)
        sq_err += float(error.square().sum())
        parts.append((codes, scale, zero))
    codes, scale = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    return codes, scale, None if symmetric else torch.cat([p[2] for p in parts]), sq_err, sq_norm


def matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in] @ dequantized(packed).T + bias, weights rounded to x.dtype first. Returns [..., out]."""
    codes = unpack(packed, bits, x.shape[-1])
    return torch.nn.functional.linear(x, dequantize(codes, scale, zero, bits, x.dtype), bias)
