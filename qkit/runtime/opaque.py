"""The kernels as opaque operators, `torch.ops.qkit.linear` and `.experts`: all that compilers and graphs see of them.

torch.compile puts the call into its graph and looks no further, so that a kernel is free to choose its tiles by the
number of rows at every call. What a kernel's `prepack` returned is any object, which a graph cannot carry: the
operator gets a handle to it instead. The handle is a tensor and not an integer: an integer would be a constant of
the graph and make every layer's graph another one, to be compiled again. Nothing here is differentiable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.select import Kernel

Prepared = tuple[Kernel, Any]  # a kernel and what its `prepack` returned

_held: dict[int, Any] = {}
_numbers = itertools.count()


def hold(kernel: Kernel, state: Any) -> torch.Tensor:
    """A handle for `linear`: int64 [] on the CPU. It holds `state` until `release`."""
    return _hold((kernel.matmul, state))


def hold_experts(experts: Sequence[tuple[Prepared, Prepared]]) -> torch.Tensor:
    """A handle for `experts`: for each expert the merged gate and up matrix [2 * wide, in], and down [out, wide]."""
    return _hold([(up.matmul, up_state, down.matmul, down_state) for (up, up_state), (down, down_state) in experts])


def _hold(what: Any) -> torch.Tensor:
    number = next(_numbers)
    _held[number] = what
    return torch.tensor(number)


def release(handle: torch.Tensor) -> None:
    """Forget what `hold` was given; the handle is of no use afterwards."""
    _held.pop(int(handle), None)


def linear(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] -> [..., out_features], by the kernel that `hold` was given.

    Raises KeyError for a released handle, and what the kernel's `matmul` raises."""
    return torch.ops.qkit.linear(x, handle, out_features, bias)  # type: ignore[no-any-return]


def experts(x: torch.Tensor, handle: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gated experts, down(silu(gate(x)) * up(x)): x [tokens, in], weights and ids [tokens, k] -> [tokens, in].

    An expert that no token chose is not read. Raises as `linear` does."""
    return torch.ops.qkit.experts(x, handle, weights, ids)  # type: ignore[no-any-return]


def _run(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    matmul, state = _held[handle.item()]  # type: ignore[index]
    return matmul(x, state, bias)  # type: ignore[no-any-return]


def _shape(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _run_experts(x: torch.Tensor, handle: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    held = _held[handle.item()]  # type: ignore[index]
    sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number in ids.unique().tolist():
        up, up_state, down, down_state = held[number]
        token, position = torch.where(ids == number)
        gate_up = up(x[token], up_state, None)
        wide = gate_up.shape[-1] // 2
        hidden = torch.nn.functional.silu(gate_up[:, :wide]) * gate_up[:, wide:]
        sums.index_add_(0, token, down(hidden, down_state, None).float() * weights[token, position, None].float())
    return sums.to(x.dtype)


def _shape_experts(x: torch.Tensor, handle: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# A fragment: other modules of qkit define operators in the same namespace. `Library` and not `custom_op`, whose
# wrapper costs several microseconds a call, which is a tenth of a small model's layer.
_library = torch.library.Library("qkit", "FRAGMENT")
_library.define("linear(Tensor x, Tensor handle, int out_features, Tensor? bias) -> Tensor")
_library.impl("linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::linear", _shape, lib=_library)
_library.define("experts(Tensor x, Tensor handle, Tensor weights, Tensor ids) -> Tensor")
_library.impl("experts", _run_experts, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::experts", _shape_experts, lib=_library)
