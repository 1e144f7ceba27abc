"""Triton kernels for CUDA and ROCm devices. Importing this imports neither triton nor a driver.

KERNELS                        the records: weights alone quantized, and activations too (`quantized`)
prepack(weight) -> Packed      the kernels' layout
linear(x, packed, bias=None)   the product
dequantize(packed, dtype)      the plain matrix
tune.tune(packed, rows, ...)   measures configurations and keeps the best
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import reference
from ..problem import Kernel, Problem
from ..weight import Weight
from . import layout, quantized
from .device import unavailable
from .layout import Packed, prepack

__all__ = ["KERNELS", "Layer", "Packed", "dequantize", "layer", "linear", "prepack", "restore", "supports"]

DTYPES = (torch.float16, torch.bfloat16)


def supports(p: Problem) -> str | None:
    """None where `linear` computes the problem, else why not."""
    if p.activations is not None:
        return "takes unquantized activations"
    if p.act_dtype not in DTYPES:
        return f"takes float16 or bfloat16 activations, not {p.act_dtype}"
    return unavailable(p.device) or layout.why_not(p.kind, p.group_size, p.shape[1])


@dataclass(frozen=True)
class Layer:
    """A packed weight and what it takes to give the `Weight` back: its scales, where they cannot be worked out."""

    packed: Packed
    scale: torch.Tensor | None
    scale_dtype: torch.dtype
    multiplier: float

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds memory for."""
        return [t for t in (*self.packed.parts(), self.scale) if isinstance(t, torch.Tensor)]


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

    bias [out] in any float type. Raises TypeError for activations that are neither float16 nor bfloat16, ValueError
    for a wrong shape or device.
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

    return torch.ops.qkit.triton_linear(x, bias, *packed.parts())  # type: ignore[no-any-return]


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight as [out, in], each value rounded once to `dtype` (float16 or bfloat16; TypeError for another)."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected torch.float16 or torch.bfloat16")
    from . import ops  # noqa: F401

    return torch.ops.qkit.triton_dequantize(dtype, *packed.parts())  # type: ignore[no-any-return]


KERNELS = (
    Kernel(
        "triton",
        supports,
        lambda w, activations: layer(w),
        lambda x, state, bias: linear(x, state.packed, bias),
        restore,
    ),
    quantized.KERNEL,
)
