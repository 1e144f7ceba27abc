"""Which kernel multiplies by a quantized weight: an ordered table that ends with the torch reference."""

from __future__ import annotations

import torch

from . import reference
from .cpu import matmul as cpu
from .problem import Kernel, Problem, problem
from .triton import KERNELS as TRITON
from .weight import Weight

__all__ = ["KERNELS", "Kernel", "Problem", "Weight", "problem", "select"]


def select(weight: Weight, act_dtype: torch.dtype, activations: str | None = None) -> Kernel:
    """The first kernel of `KERNELS` that supports the problem."""
    asked = problem(weight, act_dtype, activations)
    return next(kernel for kernel in KERNELS if kernel.supports(asked) is None)


def _check_input(x: torch.Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {in_features} inputs")


def _reference_matmul(x: torch.Tensor, state: tuple[Weight, str | None], bias: torch.Tensor | None) -> torch.Tensor:
    weight, activations = state
    _check_input(x, weight.in_features)
    return reference.matmul(x, weight, bias, activations)


KERNELS: tuple[Kernel, ...] = (
    *TRITON,
    Kernel("cpu", cpu.supports, cpu.prepack, cpu.matmul, cpu.restore),
    Kernel(
        "reference", lambda p: None, lambda w, activations: (w, activations), _reference_matmul, lambda state: state[0]
    ),
)
