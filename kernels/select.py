"""Which kernel multiplies by a quantized weight: an ordered table that ends with the torch reference."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from . import _native, dequantize, reference
from .cpu import lib
from .weight import Weight

__all__ = ["KERNELS", "Kernel", "Problem", "Weight", "problem", "select"]

ACTIVATIONS = (None, "int8", "fp8")


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for.

    kind, bits  of the weight (`weight.Weight`)
    group_size  inputs that share a scale (never 0)
    act_dtype   of x and of the result; activations None: used as they are; "int8", "fp8": quantized per token
    shape       (out_features, in_features)
    """

    kind: str
    bits: int
    group_size: int
    symmetric: bool
    act_dtype: torch.dtype
    activations: str | None
    device: torch.device
    shape: tuple[int, int]


@dataclass(frozen=True)
class Kernel:
    """One way to compute x @ dequantized(weight).T + bias.

    supports(problem)              None, or why not
    prepack(weight, activations)   -> state, whatever `matmul` wants; may share the weight's tensors
    matmul(x [..., in], state, bias [out] or None) -> [..., out] in x's dtype. Raises ValueError for a wrong shape and
                                   TypeError for a wrong dtype
    """

    name: str
    supports: Callable[[Problem], str | None]
    prepack: Callable[[Weight, str | None], Any]
    matmul: Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


def problem(weight: Weight, act_dtype: torch.dtype, activations: str | None = None) -> Problem:
    """The problem that `weight` poses for activations of `act_dtype`. Raises ValueError for unknown `activations`."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {activations!r}")
    shape = (weight.out_features, weight.in_features)
    symmetric = weight.zero is None
    return Problem(weight.kind, weight.bits, weight.group_size, symmetric, act_dtype, activations, weight.device, shape)


def select(weight: Weight, act_dtype: torch.dtype, activations: str | None = None) -> Kernel:
    """The first kernel of `KERNELS` that supports the problem."""
    asked = problem(weight, act_dtype, activations)
    return next(kernel for kernel in KERNELS if kernel.supports(asked) is None)


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
    if p.kind != "int" or p.activations is not None:
        return "takes integer weights and unquantized activations"
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


def _cpu_prepack(w: Weight, activations: str | None) -> Weight:
    zero = None if w.zero is None else w.zero.contiguous()
    return Weight(w.packed.contiguous(), w.scale.contiguous(), zero, w.bits, w.in_features)


def _check_input(x: torch.Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {in_features} inputs")


def _cpu_matmul(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    _check_input(x, w.in_features)
    if x.requires_grad and torch.is_grad_enabled():  # torch must see the product to differentiate it
        return reference.matmul(x, w, bias)
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


def _reference_matmul(x: torch.Tensor, state: tuple[Weight, str | None], bias: torch.Tensor | None) -> torch.Tensor:
    weight, activations = state
    _check_input(x, weight.in_features)
    return reference.matmul(x, weight, bias, activations)


KERNELS: tuple[Kernel, ...] = (
    Kernel("cpu", _cpu_supports, _cpu_prepack, _cpu_matmul),
    Kernel("reference", lambda problem: None, lambda w, activations: (w, activations), _reference_matmul),
)
