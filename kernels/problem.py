"""What a kernel is asked for, and what one offers: a leaf, so that every backend can export its own record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .weight import Weight

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
    restore(state)                 -> the weight that was prepacked, bit for bit: so a layer need not keep both
    """

    name: str
    supports: Callable[[Problem], str | None]
    prepack: Callable[[Weight, str | None], Any]
    matmul: Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]
    restore: Callable[[Any], Weight]


def problem(weight: Weight, act_dtype: torch.dtype, activations: str | None = None) -> Problem:
    """The problem that `weight` poses for activations of `act_dtype`. Raises ValueError for unknown `activations`."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {activations!r}")
    shape = (weight.out_features, weight.in_features)
    symmetric = weight.zero is None
    return Problem(weight.kind, weight.bits, weight.group_size, symmetric, act_dtype, activations, weight.device, shape)
