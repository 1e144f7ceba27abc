"""Which kernel multiplies by a quantized weight: an ordered table that ends with the torch reference."""

from __future__ import annotations

import torch

from . import reference
from .cpu import matmul as cpu
from .problem import Kernel, Problem, problem
from .triton import KERNELS as TRITON
from .weight import Weight

__all__ = ["KERNELS", "Kernel", "Problem", "Weight", "problem", "select"]

KERNELS: tuple[Kernel, ...] = (*TRITON, cpu.KERNEL, reference.KERNEL)


def select(weight: Weight, act_dtype: torch.dtype, activations: str | None = None) -> Kernel:
    """The first kernel of `KERNELS` that supports the problem."""
    asked = problem(weight, act_dtype, activations)
    return next(kernel for kernel in KERNELS if kernel.supports(asked) is None)
