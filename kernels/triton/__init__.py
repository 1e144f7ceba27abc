"""Triton kernels for CUDA and ROCm devices. Importing this imports neither triton nor a driver.

prepack(weights, paired=False) -> Packed     the kernels' layout, from one `Weight` or several to be merged
linear(x, packed, bias=None)                 the product; SiLU(gate) * up where the weights are paired
dequantize(packed, dtype)                    the plain matrix
supports(problem)                            None, or why not
tune.tune(packed, rows, ...)                 measures configurations and keeps the best
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import reference
from ..weight import Weight
from . import layout
from .layout import Packed, prepack

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["Layer", "Packed", "dequantize", "layer", "linear", "prepack", "restore", "supports"]

DTYPES = (torch.float16, torch.bfloat16)

LEAST = (8, 0)  # compute capability


def supports(p: Problem) -> str | None:
    """None where `linear` computes the problem, else why not."""
    if p.activations is not None:
        return "takes unquantized activations"
    if p.act_dtype not in DTYPES:
        return f"takes float16 or bfloat16 activations, not {p.act_dtype}"
    return unavailable(p.device) or layout.why_not(p.kind, p.group_size, p.shape[1])


def unavailable(device: torch.device) -> str | None:
    """None where Triton kernels can run on `device` here, else why not."""
    if device.type != "cuda":
        return f"runs on CUDA and ROCm devices, not on {device.type}"
    if reference.forced():
        return "QKIT_REFERENCE=1"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST:  # bfloat16 products and asynchronous copies: Triton fails there with pages of PTX
            return f"needs compute capability {LEAST[0]}.{LEAST[1]}, this GPU has {capability[0]}.{capability[1]}"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@dataclass(frozen=True)
class Layer:
    """A packed weight and what it takes to give the `Weight` back: its scales, where they cannot be worked out."""

    packed: Packed
    scale: torch.Tensor | None
    scale_dtype: torch.dtype
    multiplier: float


def layer(w: Weight) -> Layer:
    """`prepack`, and how to undo it. Raises ValueError for a group size that does not fill planes."""
    packed = prepack(w)
    known = torch.equal(
        layout.restore_scale(packed, w.scale.dtype).view(torch.uint8), w.scale.contiguous().view(torch.uint8)
    )
    return Layer(packed, None if known else w.scale, w.scale.dtype, w.multiplier)


def restore(state: Layer) -> Weight:
    """The weight that `layer` took, bit for bit."""
    p = state.packed
    scale = layout.restore_scale(p, state.scale_dtype) if state.scale is None else state.scale
    zero = None
    if p.zero is not None:
        zero = p.zero[: p.in_features // p.group_size, : p.out_features].t().contiguous()
    codes = reference.pack(layout.codes(p), p.bits)
    return Weight(codes, scale.contiguous(), zero, p.bits, p.in_features, p.kind, state.multiplier)


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] @ weight.T + bias -> [..., out] in x's dtype, accumulated in float32.

    bias [out] in any float type. Where the weight is `paired` (rows gate 0, up 0, gate 1, ...; the bias likewise) the
    result is silu(gate) * up, [..., out / 2].
    Raises TypeError for activations that are neither float16 nor bfloat16, ValueError for a wrong shape or device.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}, expected torch.float16 or torch.bfloat16")
    if x.dim() < 1 or x.shape[-1] != packed.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {packed.in_features} inputs")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.device}")
    if bias is not None:
        if bias.shape != (packed.out_features,) or bias.device != x.device:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} on {bias.device}, expected ({packed.out_features},) on {x.device}"
            )
        bias = bias.to(x.dtype).contiguous()
    from . import ops  # noqa: F401  registers the operators; triton comes with it

    p = packed
    return torch.ops.qkit.triton_linear(
        x, p.words, p.scale, p.zero, p.row, p.table, bias, p.kind, p.bits, p.group_size, p.out_features, p.in_features,
        p.paired,
    )  # fmt: skip


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [out, in], each value rounded once to `dtype` (float16 or bfloat16; TypeError for another)."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected torch.float16 or torch.bfloat16")
    from . import ops  # noqa: F401

    p = packed
    return torch.ops.qkit.triton_dequantize(
        p.words, p.scale, p.zero, p.row, p.table, p.kind, p.bits, p.group_size, p.out_features, p.in_features, dtype
    )
