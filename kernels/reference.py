"""The torch oracle every kernel is tested against, and the fallback where none fits. Simple beats fast here.

Layout shared by all kernels ("packed"): int32 [out, in * bits / 32], codes unsigned, low bits first. It is
byte for byte what compressed-tensors stores, and the transpose of what GPTQ stores. `weight.Weight` says what the
codes mean.
"""

from __future__ import annotations

import os

import torch

from .errors import NonFiniteError, ScaleOverflowError
from .problem import Kernel
from .weight import TABLES, Weight


def forced() -> bool:
    """Whether `QKIT_REFERENCE=1` asks for this module instead of any kernel."""
    return os.environ.get("QKIT_REFERENCE") == "1"


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, ceil(n * bits / 32)], low bits first, zero padded. bits: 4 or 8."""
    per_word = 32 // bits
    rows, n = codes.shape
    packed = torch.zeros(rows, -(-n // per_word), dtype=torch.int32, device=codes.device)
    for i in range(min(per_word, n)):  # one code of each word at a time: weights are large
        part = codes[:, i::per_word].int()
        part <<= i * bits
        packed[:, : part.shape[1]] |= part
    return packed


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """int32 [rows, words] -> uint8 codes [rows, n]; the inverse of `pack`."""
    codes = torch.empty(*packed.shape, 32 // bits, dtype=torch.uint8, device=packed.device)
    for i in range(32 // bits):
        codes[..., i] = (packed >> (i * bits)) & ((1 << bits) - 1)
    return codes.view(packed.shape[0], -1)[:, :n].contiguous()


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


def quantize(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Nearest code (ties to even) on a given grid: uint8 [out, in]. w float [out, in], scale/zero [out, groups]."""
    out, in_ = w.shape
    groups = scale.shape[1]
    q = torch.round(w.view(out, groups, in_ // groups).float() / scale.float().unsqueeze(-1))
    q = q + (float(1 << (bits - 1)) if zero is None else zero.float().unsqueeze(-1))
    return q.clamp_(0, (1 << bits) - 1).to(torch.uint8).view(out, in_)


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 scales rounded to their stored type; float16 by way of bfloat16 (engines read either)."""
    return scale.to(torch.bfloat16).to(torch.float16) if dtype == torch.float16 else scale.to(dtype)


def span(w: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """min(0, w) and max(0, w) of each group, float32 [out, groups]. Raises NonFiniteError."""
    grouped = w.float().view(w.shape[0], groups, -1)
    lo, hi = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):  # amin and amax propagate NaN
        raise NonFiniteError("the weight contains NaN or infinity")
    return lo, hi


def grid_of_span(
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    multiplier: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`grid` for known spans, the scale stretched by `multiplier` before it is rounded. May hold infinities."""
    max_code = (1 << bits) - 1
    if symmetric:
        exact = torch.where(hi >= -lo, hi, lo) / -float(1 << (bits - 1))
    else:
        exact = torch.maximum((hi - lo) / max_code, hi / (max_code - min_zero))
    scale = round_scale(exact * multiplier, scale_dtype)
    least = 2.0**-24 if scale_dtype == torch.float16 else 2.0**-126
    scale = torch.where(scale.float().abs() < least, 1.0, scale.float()).to(scale_dtype)
    if symmetric:
        return scale, None
    zero = torch.round(-lo / scale.float()).clamp_(min_zero, max_code).to(torch.uint8)
    return scale, zero


def grid(
    w: torch.Tensor, bits: int, groups: int, symmetric: bool, scale_dtype: torch.dtype, min_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The round-to-nearest grid of each group: scale [out, groups] in scale_dtype, zero uint8 or None (symmetric).

    symmetric   scale = (the weight of largest magnitude, signed; the positive one on a tie) / -(2**(bits-1)),
                so that this weight has a code of its own, 0
    asymmetric  with lo = min(0, w) and hi = max(0, w): scale = max((hi-lo)/max_code, hi/(max_code-min_zero)),
                zero = round(-lo/scale) in min_zero .. max_code
    A scale that is zero once stored (in bfloat16 and float32 also a subnormal one, which engines flush) is 1.
    Raises NonFiniteError and ScaleOverflowError.
    """
    scale, zero = grid_of_span(*span(w, groups), bits, symmetric, scale_dtype, min_zero)
    if not torch.isfinite(scale).all():
        raise ScaleOverflowError("a scale overflows its stored type")
    return scale, zero


_LANES = 16
_BLOCK = 16 * _LANES


def squared_error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each group loses on its grid: squared error and squared norm, float64 [out, groups, 16].

    The sixteen lanes are partial sums, formed in the order of kernels/cpu/quantize.h so that both paths agree bit for
    bit: float32 in units of the scale over at most 16 values, float64 beyond.
    """
    out, in_ = w.shape
    groups = scale.shape[1]
    size = in_ // groups
    s = scale.float().unsqueeze(-1)
    z = torch.tensor(float(1 << (bits - 1))) if zero is None else zero.float().unsqueeze(-1)
    t = w.float().view(out, groups, size) / s
    e = t - torch.clamp(t.round(), -z, ((1 << bits) - 1) - z)
    s2 = scale.double().square().unsqueeze(-1)
    sums = []
    for values in (e, t):
        squares = torch.nn.functional.pad(values * values, (0, -size % _LANES))
        total = torch.zeros(out, groups, _LANES, dtype=torch.float64, device=w.device)
        for block in squares.split(_BLOCK, dim=-1):
            lanes = torch.zeros(out, groups, _LANES, device=w.device)
            for part in block.split(_LANES, dim=-1):
                lanes = lanes + part
            total = total + lanes.double() * s2
        sums.append(total)
    return sums[0], sums[1]


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, from first to last (torch's own order is unspecified)."""
    total = torch.zeros_like(values[..., 0])
    for k in range(values.shape[-1]):
        total = total + values[..., k]
    return total


def _search(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    min_zero: int,
    multipliers: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Per group the best multiple of the spanning scale, the first on a tie. scale, zero: `grid`."""
    lo, hi = span(w, scale.shape[1])
    best = _in_order(squared_error(w, scale, zero, bits)[0])
    for multiplier in multipliers:
        other, other_zero = grid_of_span(lo, hi, bits, zero is None, scale.dtype, min_zero, multiplier)
        left = _in_order(squared_error(w, other, other_zero, bits)[0])
        better = (left < best) & torch.isfinite(other)
        best = torch.where(better, left, best)
        scale = torch.where(better, other, scale)
        if zero is not None and other_zero is not None:
            zero = torch.where(better, other_zero, zero)
    return scale, zero


_CHUNK = 1 << 20  # weights taken at a time: the temporaries stay within some 100 MB


def quantize_rtn(
    w: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    min_zero: int,
    multipliers: tuple[float, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, float]:
    """Round to nearest on `grid`: codes, scale, zero, sum of squared errors, sum of squares.

    multipliers: clip search; each group takes the one of the spanning scale and its multiples that leaves the
    least squared error.
    """
    all_codes, scales, zeros = [], [], []
    sq_err = sq_norm = 0.0
    for rows in w.split(max(1, _CHUNK // w.shape[1])):
        scale, zero = grid(rows, bits, groups, symmetric, scale_dtype, min_zero)
        if multipliers:
            scale, zero = _search(rows, scale, zero, bits, min_zero, multipliers)
        all_codes.append(quantize(rows, scale, zero, bits))
        scales.append(scale)
        if zero is not None:
            zeros.append(zero)
        error, norm = squared_error(rows, scale, zero, bits)
        # Groups first, then lanes, then rows.
        for row in _in_order(_in_order(error.transpose(1, 2))).tolist():
            sq_err += row
        for row in _in_order(_in_order(norm.transpose(1, 2))).tolist():
            sq_norm += row
    return torch.cat(all_codes), torch.cat(scales), torch.cat(zeros) if zeros else None, sq_err, sq_norm


def dequantize_weight(w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight of any kind as [out, in] in `dtype`: value of the code times scale in float32, rounded once."""
    codes = unpack(w.packed, w.bits, w.in_features)
    if w.kind == "int":
        return dequantize(codes, w.scale, w.zero, w.bits, dtype)
    out, groups = codes.shape[0], w.scale.shape[1]
    values = torch.tensor(TABLES[w.kind], device=codes.device)[codes.int()] if w.kind in TABLES else _e4m3(codes)
    return (values.view(out, groups, -1) * w.float_scale().unsqueeze(-1)).view(out, -1).to(dtype)


def _e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.float8_e4m3fn).float()


def quantize_activations(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic per-token quantization: x [..., in] -> (values as float32, scale float32 [..., 1]).

    "int8": scale = max|x| / 127, round to nearest even. "fp8": scale = max|x| / 448, rounded to e4m3. An all-zero
    token has scale 1; one that holds NaN or infinity comes out as NaN.
    """
    largest = {"int8": 127.0, "fp8": 448.0}[kind]
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    t = (x.float() / scale).clamp_(-largest, largest)  # a scale that is almost 0 is rounded itself
    return (t.round() if kind == "int8" else t.to(torch.float8_e4m3fn).float()), scale


def matmul(
    x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None, activations: str | None = None
) -> torch.Tensor:
    """x [..., in] @ dequantized(w).T + bias: [..., out] in x's dtype.

    activations  None: weights are rounded to x.dtype first. "int8" or "fp8": x is quantized per token
                 (`quantize_activations`) and multiplied in float32.
    Raises ValueError for another number of inputs.
    """
    if x.shape[-1] != w.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {w.in_features} inputs")
    if activations is None:
        return torch.nn.functional.linear(x, dequantize_weight(w, x.dtype), bias)
    values, scale = quantize_activations(x, activations)
    y = torch.nn.functional.linear(values, dequantize_weight(w, torch.float32)) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _of_state(x: torch.Tensor, state: tuple[Weight, str | None], bias: torch.Tensor | None) -> torch.Tensor:
    return matmul(x, state[0], bias, state[1])


KERNEL = Kernel("reference", lambda p: None, lambda w, activations: (w, activations), _of_state, lambda state: state[0])
