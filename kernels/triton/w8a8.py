"""8-bit weights times activations quantized per token on the fly: int8 (tensor cores count exactly) and fp8 (e4m3).

Two or three launches: quantize the rows (`activations`), multiply, and where the reduction is split over programs, sum
the parts in a fixed order. Cards without e4m3 products multiply the same values as float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..weight import FLOATS, Weight
from .activations import quantize_rows
from .device import card
from .layout import nan_rows, why_not_quantized

_MULTIPLE = 128  # both dimensions of a weight are padded to it, so that no load of it is masked


@triton.jit
def _half(w):
    """e4m3 codes, uint8, as float16 over 256: sign and exponent and significand moved to their places."""
    v = w.to(tl.int16)
    return (((v & 0x80) << 8) | ((v & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _finish(acc, scale, row, sums, shift, bias, y, M, N, rm, rn, ROW: tl.constexpr):
    """The float32 output of a tile of sums [rm, rn]: zero points, scales, bias."""
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    if shift is not None:
        acc -= tl.load(sums + rm, mask=rm < M, other=0)[:, None] * tl.load(shift + rn)[None, :]
    out = acc.to(tl.float32) * tl.load(scale + rm, mask=rm < M, other=0.0)[:, None]
    if ROW:
        out *= tl.load(row + rn)[None, :]
    if bias is not None:
        out += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rm.to(tl.int64)[:, None] * N + rn[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _w8a8(
    x, w, scale, row, sums, shift, bias, y, M, N, K, PADDED_N,
    GROUP: tl.constexpr, AS_HALF: tl.constexpr, SPLIT_K: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid, part = tl.program_id(0), tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)  # neighbouring programs share a tile of weights
    first_m = (pid % blocks_m) * BLOCK_M
    first_n = (pid // blocks_m) * BLOCK_N
    rm = first_m + tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(K // BLOCK_K, SPLIT_K)
    first = part * steps
    last = tl.minimum(first + steps, K // BLOCK_K)
    # Rows past the end repeat the last one, so that no load is masked; they are never stored.
    xp = x + tl.minimum(rm, M - 1)[:, None].to(tl.int64) * K + first * BLOCK_K + rk[None, :]
    wp = w + first_n.to(tl.int64) * K + first * BLOCK_K + (rn[None, :] * K + rk[:, None])
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in range(first, last):
        a = tl.load(xp)
        b = tl.load(wp)
        if AS_HALF:
            b = _half(b)
        if GROUP:
            s = tl.load(row + (step * BLOCK_K // GROUP) * PADDED_N + first_n + rn)
            acc += tl.dot(a, b).to(tl.float32) * s[None, :]
        elif ACC == tl.int32 or AS_HALF:
            acc = tl.dot(a, b, acc, out_dtype=ACC)
        else:  # some cards sum e4m3 products in fewer bits than float32 has
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=BLOCK_K)
        xp += BLOCK_K
        wp += BLOCK_K
    if AS_HALF:
        acc *= 256.0
    if SPLIT_K == 1:
        _finish(acc, scale, row, sums, shift, bias, y, M, N, rm, first_n + rn, GROUP == 0)
    else:
        at = (part.to(tl.int64) * M + rm[:, None]) * PADDED_N + (first_n + rn)[None, :]
        tl.store(y + at, acc, mask=(rm < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def _sum_parts(
    parts, scale, row, sums, shift, bias, y, M, N, PADDED_N,
    GROUP: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) + tl.arange(0, 1)
    rn = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([1, BLOCK], parts.dtype.element_ty)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(parts + (tl.program_id(0).to(tl.int64) + part * M) * PADDED_N + rn)[None, :]
    _finish(acc, scale, row, sums, shift, bias, y, M, N, rm, rn, GROUP == 0)


@dataclass(frozen=True)
class Packed8:
    """A weight for `matmul`, both dimensions padded to multiples of 128.

    codes   int8, or for "fp8" uint8 (e4m3) [padded_n, padded_k], inputs contiguous, as the tensor cores take them
    scale   float32 [padded_n], or [groups, padded_n] where a row has several
    shift   int32 [padded_n]: what is subtracted from each int8 code, None for zero
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    kind: str
    out_features: int
    in_features: int
    group_size: int  # 0: one scale a row

    def parts(self) -> tuple[Any, ...]:
        """What `Packed8` is made of, in its order: as operators take it."""
        return tuple(vars(self).values())


def prepack(w: Weight, activations: str) -> Packed8:
    """`Weight` -> `Packed8`. Raises ValueError for what `layout.why_not_quantized` names."""
    reason = why_not_quantized(w.kind, w.bits, w.group_size, w.in_features, w.zero is None, activations)
    if reason is not None:
        raise ValueError(f"w8a8 {reason}")
    out, in_ = w.out_features, w.in_features
    rows, width = (-(-n // _MULTIPLE) * _MULTIPLE for n in (out, in_))
    fill = 128 if w.kind == "int" else 0
    codes = torch.full((rows, width), fill, dtype=torch.uint8, device=w.device)
    codes[:out, :in_] = w.packed.contiguous().view(torch.uint8)[:, :in_]
    scale = torch.where(nan_rows(w)[:, None], float("nan"), w.float_scale())
    scale = torch.nn.functional.pad(scale, (0, 0, 0, rows - out)).t().contiguous()
    shift = None
    if w.kind == "int":
        codes = (codes ^ 128).view(torch.int8)
        if w.zero is not None:
            shift = torch.nn.functional.pad(w.zero[:, 0].int() - 128, (0, rows - out))
    group = 0 if scale.shape[0] == 1 else w.group_size
    return Packed8(codes, scale[0].contiguous() if group == 0 else scale, shift, w.kind, out, in_, group)


@dataclass(frozen=True)
class Tiles:
    block_m: int
    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int


def tiles(m: int, n: int, k: int, group_size: int, as_half: bool, processors: int) -> Tiles:
    """Tiles for m rows and a padded weight [n, k]; the row counts fall into three buckets."""
    block_k = 64 if as_half or (group_size and group_size % 128) else 128
    if m > 64:  # float16 operands take twice the registers
        return Tiles(128, 64 if as_half else 128, block_k, 1, 8, 3)
    block_m, block_n = (16, 64) if m <= 16 else (64, 64)
    programs = n // block_n * (-(-m // block_m))
    split = 1
    # About two programs a processor keep memory busy; a part of fewer than four steps costs more than it saves.
    while split < 16 and 2 * programs * split < 3 * processors and k // block_k // (2 * split) >= 4:
        split *= 2
    return Tiles(block_m, block_n, block_k, split, 4, 4)


def launch(x: torch.Tensor, w: Packed8, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in], checked and on the current device -> [rows, out] in x's dtype."""
    on = card(x.device)
    as_half = w.kind == "fp8" and not on.fp8
    m, n = x.shape[0], w.out_features
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    padded_n, k = w.codes.shape
    kind = "int8" if w.kind == "int" else "fp8 as half" if as_half else "fp8"
    q, scale, sums = quantize_rows(x if x.stride(1) == 1 else x.contiguous(), kind, k)
    codes = w.codes if w.kind == "int" or as_half else w.codes.view(torch.float8_e4m3fn)
    c = tiles(m, padded_n, k, w.group_size, as_half, on.processors)
    count = tl.int32 if w.kind == "int" and not w.group_size else tl.float32
    target, epilogue = y, (scale, w.scale, sums, w.shift, bias)
    if c.split_k > 1:
        dtype = torch.int32 if count == tl.int32 else torch.float32
        target = torch.empty(c.split_k, m, padded_n, dtype=dtype, device=x.device)
    _w8a8[(triton.cdiv(m, c.block_m) * (padded_n // c.block_n), c.split_k)](
        q, codes, *epilogue, target, m, n, k, padded_n, w.group_size, as_half, c.split_k, count,
        c.block_m, c.block_n, c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    if c.split_k > 1:
        _sum_parts[(m, padded_n // 128)](
            target, *epilogue, y, m, n, padded_n, w.group_size, c.split_k, 128, num_warps=1
        )
    return y


@torch.library.custom_op("qkit::w8a8", mutates_args=())
def _op(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    kind: str,
    out_features: int,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    with torch.cuda.device_of(x):
        return launch(x, Packed8(codes, scale, shift, kind, out_features, in_features, group_size), bias)


@_op.register_fake
def _(x, bias, codes, scale, shift, kind, out_features, in_features, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


def dequantize(w: Packed8, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [out, in]: codes times scales in float32, rounded once."""
    codes = w.codes if w.kind == "int" else w.codes.view(torch.float8_e4m3fn)
    values = codes[: w.out_features, : w.in_features].float()
    if w.shift is not None:
        values -= w.shift[: w.out_features, None]
    scale = w.scale.view(-1, w.codes.shape[0])[:, : w.out_features].t()
    return (values.view(w.out_features, scale.shape[1], -1) * scale.unsqueeze(-1)).view(values.shape).to(dtype)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    _, _, codes, scale, shift, *about = inputs
    ctx.save_for_backward(codes, scale, shift)  # type: ignore[arg-type]
    ctx.about = about  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Straight through the rounding of activations: the gradient of the product with the dequantized weight."""
    w = Packed8(*ctx.saved_tensors, *ctx.about)  # type: ignore[attr-defined]
    bias = grad.sum(0) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
    return (grad @ dequantize(w, grad.dtype), bias, *[None] * len(w.parts()))


_op.register_autograd(_backward, setup_context=_save)


def matmul(x: torch.Tensor, w: Packed8, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] @ w.T + bias: [..., out] in x's dtype, x quantized per token (`reference.quantize_activations`).

    x float32, float16 or bfloat16 on the weight's device; bias [out]. Raises TypeError for another dtype and ValueError
    for a shape or a device that does not fit, with the values.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}, expected " + " or ".join(str(d) for d in FLOATS))
    if x.dim() < 1 or x.shape[-1] != w.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {w.in_features} inputs")
    if bias is not None and tuple(bias.shape) != (w.out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight has {w.out_features} outputs")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != w.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {w.codes.device}")
    flat = x.reshape(-1, w.in_features)
    if bias is not None:
        bias = bias.contiguous()
    y = _op(flat, bias, *w.parts())
    return y.view(*x.shape[:-1], w.out_features)
