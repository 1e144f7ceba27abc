"""The kernels as one opaque operator, `torch.ops.qkit.linear`: what compilers and graph capture see of them.

torch.compile puts the call into its graph and looks no further, so that a kernel is free to choose its tiles by the
number of rows at every call. What a kernel's `prepack` returned is any object, which a graph cannot carry: the
operator gets a handle to it instead. The handle is a tensor and not an integer: an integer would be a constant of
the graph and make every layer's graph another one, to be compiled again.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..kernels.select import Kernel

_held: dict[int, tuple[Any, Any]] = {}
_numbers = itertools.count()


def hold(kernel: Kernel, state: Any) -> torch.Tensor:
    """A handle for `linear`: int64 [] on the CPU. It holds `state` until `release`."""
    number = next(_numbers)
    _held[number] = (kernel.matmul, state)
    return torch.tensor(number)


def release(handle: torch.Tensor) -> None:
    """Forget what `hold` was given; the handle is of no use afterwards."""
    _held.pop(int(handle), None)


def linear(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] -> [..., out_features], by the kernel that `hold` was given. Not differentiable.

    Raises KeyError for a released handle, and what the kernel's `matmul` raises."""
    return torch.ops.qkit.linear(x, handle, out_features, bias)  # type: ignore[no-any-return]


def _run(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    matmul, state = _held[handle.item()]  # type: ignore[index]
    return matmul(x, state, bias)  # type: ignore[no-any-return]


def _shape(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


# A fragment: other modules of qkit define operators in the same namespace. `Library` and not `custom_op`, whose
# wrapper costs several microseconds a call, which is a tenth of a small model's layer.
_library = torch.library.Library("qkit", "FRAGMENT")
_library.define("linear(Tensor x, Tensor handle, int out_features, Tensor? bias) -> Tensor")
_library.impl("linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::linear", _shape, lib=_library)
