"""Which kernel multiplies by a packed weight: an ordered table that ends with the torch reference."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from . import _native, check_weight, dequantize, reference
from .cpu import lib


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for. group_size is the number of inputs that share a scale (never 0)."""

    bits: int
    group_size: int
    symmetric: bool
    act_dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class Weight:
    """A packed weight as the kernels here keep it: nothing is copied, memory stays that of the checkpoint."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    in_features: int


@dataclass(frozen=True)
class Kernel:
    """One way to compute x @ dequantized(packed).T + bias.

    supports(problem)            None, or why not
    prepack(packed, scale, zero, bits, in_features) -> state    (int32 [out, words], [out, groups], uint8 or None)
    matmul(x [..., in], state, bias [out] or None) -> [..., out] in x's dtype
    """

    name: str
    supports: Callable[[Problem], str | None]
    prepack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int, int], Any]
    matmul: Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


def _prepack(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, in_features: int
) -> Weight:
    check_weight(packed, scale, zero, bits, in_features)
    zero = None if zero is None else zero.contiguous()
    return Weight(packed.contiguous(), scale.contiguous(), zero, bits, in_features)


# At most this many activation vectors go through the fused kernel; above it dequantizing once and torch's GEMM win.
GEMV_MAX = 8
_scratch = threading.local()


def _buffer(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A scratch buffer of this thread, as large as its largest layer: no allocation per call."""
    held: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("held", {})
    if dtype not in held or held[dtype].numel() < numel:
        held[dtype] = torch.empty(numel, dtype=dtype)
    return held[dtype][:numel]


def _cpu_supports(p: Problem) -> str | None:
    if p.device.type != "cpu":
        return f"runs on the CPU, not on {p.device.type}"
    if p.act_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16 activations, not {p.act_dtype}"
    per_word = 32 // p.bits
    if p.shape[1] % per_word or p.group_size % per_word:
        return f"needs in_features and group size to be multiples of {per_word}, not {p.shape[1]} and {p.group_size}"
    if os.environ.get("QKIT_REFERENCE") == "1":
        return "QKIT_REFERENCE=1"
    return None if _native() else str(lib.load())


def _cpu_matmul(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[-1] != w.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {w.in_features} inputs")
    if x.requires_grad and torch.is_grad_enabled():  # torch must see the product to differentiate it
        return _reference_matmul(x, w, bias)
    out_features = w.packed.shape[0]
    rows = x.numel() // w.in_features
    if 1 <= rows <= GEMV_MAX:
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        flat = x.reshape(rows, w.in_features).contiguous()
        return lib.gemv(flat, w.packed, w.scale, w.zero, w.bits, bias).view(*x.shape[:-1], out_features)
    buffer = _buffer(out_features * w.in_features, x.dtype).view(out_features, w.in_features)
    dequantize(w.packed, w.scale, w.zero, w.bits, w.in_features, x.dtype, out=buffer)
    return F.linear(x, buffer, bias)


def _reference_matmul(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    return reference.matmul(x, w.packed, w.scale, w.zero, w.bits, bias)


KERNELS: tuple[Kernel, ...] = (
    Kernel("cpu", _cpu_supports, _prepack, _cpu_matmul),
    Kernel("reference", lambda problem: None, _prepack, _reference_matmul),
)


def select(
    bits: int,
    group_size: int,
    symmetric: bool,
    act_dtype: torch.dtype,
    device: torch.device | str,
    shape: tuple[int, int],
) -> Kernel:
    """The first kernel of `KERNELS` that supports the problem; group_size 0 is one group a row."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    problem = Problem(bits, group_size or shape[1], symmetric, act_dtype, torch.device(device), shape)
    return next(kernel for kernel in KERNELS if kernel.supports(problem) is None)
