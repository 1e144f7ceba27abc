"""8-bit weights times activations quantized per token, `w8a8`, as a record.

Importing this imports neither triton nor a driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import reference
from ..problem import Kernel, Problem
from ..weight import FLOATS, Weight
from .device import unavailable
from .layout import why_not_quantized

if TYPE_CHECKING:
    from .w8a8 import Packed8


def supports(p: Problem) -> str | None:
    """None where `matmul` computes the problem, else why not."""
    if p.activations is None:
        return "takes activations quantized to int8 or fp8"
    if p.act_dtype not in FLOATS:
        return f"takes float32, float16 or bfloat16 activations, not {p.act_dtype}"
    return unavailable(p.device) or why_not_quantized(
        p.kind, p.bits, p.group_size, p.shape[1], p.symmetric, p.activations
    )


@dataclass(frozen=True)
class Layer:
    """A packed weight, and the scales and zero points as they were, to give the `Weight` back."""

    packed: Packed8
    scale: torch.Tensor
    zero: torch.Tensor | None
    multiplier: float

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds memory for."""
        held = (self.packed.codes, self.packed.scale, self.packed.shift, self.scale, self.zero)
        return [t for t in held if t is not None]


def prepack(w: Weight, activations: str | None) -> Layer:
    """Raises ValueError for a weight that `layout.why_not_quantized` refuses."""
    from . import w8a8

    return Layer(w8a8.prepack(w, str(activations)), w.scale, w.zero, w.multiplier)


def matmul(x: torch.Tensor, state: Layer, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`w8a8.matmul`."""
    from . import w8a8

    return w8a8.matmul(x, state.packed, bias)


def restore(state: Layer) -> Weight:
    """The weight that `prepack` took, bit for bit."""
    p = state.packed
    codes = p.codes[: p.out_features, : p.in_features]
    codes = codes.view(torch.uint8) ^ 128 if p.kind == "int" else codes
    return Weight(reference.pack(codes, 8), state.scale, state.zero, 8, p.in_features, p.kind, state.multiplier)


KERNEL = Kernel("triton-w8a8", supports, prepack, matmul, restore)
