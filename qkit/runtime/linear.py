"""`QuantLinear`: an nn.Linear whose weight stays packed in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..kernels.codes import values_of
from ..kernels.select import Kernel, Weight, select
from ..spec import LayerSpec

# What a layer holds, it holds in one place or the other: whoever moves or reads it whole has this lock. One for all
# layers, since it is taken at their first call and seldom after that, and copies would need one of their own.
_MOVING = threading.RLock()


class QuantLinear(nn.Module):
    """y = x @ dequantized(weight).T + bias, computed by the first kernel that supports it. The weight is held as
    `Weight.plain` gives it.

    Buffers, all in state_dict: packed int32 [out, ceil(in*bits/32)], scale [out, groups] in the type it was
    stored with (a cast of the module does not round it), zero uint8 [out, groups] or None, bias [out] or None.
    The kernel is chosen at the first call (or by `select`), for the input's dtype and the device the weight is on then.
    From then on the weight is held only as that kernel wants it: where that is another layout, `packed`, `scale` and
    `zero` are None. state_dict, copies and moves to another device or type still see the buffers above. Inputs of a
    second type work too, at the cost of a second copy of the weight.
    """

    packed: torch.Tensor | None
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None, activations: str | None = None):
        """activations: "int8" or "fp8": inputs are quantized per token by a kernel that multiplies so; where none
        does, they are used as they are."""
        super().__init__()
        self.scheme: LayerSpec = weight.spec
        self.activations = activations
        weight = weight.plain()
        self.in_features = weight.in_features
        self.out_features = weight.packed.shape[0]
        self.kind, self.bits, self.multiplier = weight.kind, weight.bits, weight.multiplier
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(self.out_features,)}")
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", bias)
        # act dtype -> kernel and its view of the weight. Derived from the buffers: dropped when they change. Replaced
        # as a whole, so that it may be read without the lock.
        self._ready: dict[torch.dtype, tuple[Kernel, Any]] = {}
        self._compact: torch.dtype | None = None  # the one of these that holds the weight, where the buffers do not

    @property
    def qweight(self) -> torch.Tensor:
        """A tensor of the weight, under the name by which PEFT tells a packed layer's device."""
        return self.tensors()[0]

    def select(self, dtype: torch.dtype) -> Kernel:
        """The kernel for activations of `dtype`, where the weight is now; the weight moves into its layout."""
        return self._prepared(dtype)[0]

    def quantized(self) -> Weight:
        """The quantized weight as it was given, restored where the layer is compact."""
        with _MOVING:
            if self._compact is not None:
                kernel, state = self._ready[self._compact]
                return kernel.restore(state)
            assert self.packed is not None and self.scale is not None
            return Weight(self.packed, self.scale, self.zero, self.bits, self.in_features, self.kind, self.multiplier)

    def _columns(self) -> Weight:
        """The weight as kernels take it, its columns as they lie."""
        return replace(self.quantized(), order=None)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor the layer holds memory for, once each."""
        with _MOVING:
            held = (self.packed, self.scale, self.zero, [state for _, state in self._ready.values()], self.bias)
        return list({id(t): t for t in _tensors_in(held)}.values())

    def _expand(self) -> None:
        """Puts the buffers back; kernels are chosen anew at the next call. Called with the lock."""
        if self._compact is not None:
            weight = self.quantized()
            self.packed, self.scale, self.zero = weight.packed, weight.scale, weight.zero
            self._compact = None
        self._ready = {}

    def _prepared(self, dtype: torch.dtype) -> tuple[Kernel, Any]:
        ready = self._ready.get(dtype)
        return self._prepare(dtype) if ready is None else ready

    def _prepare(self, dtype: torch.dtype) -> tuple[Kernel, Any]:
        with _MOVING:
            if (ready := self._ready.get(dtype)) is not None:  # by another thread, meanwhile
                return ready
            weight = self._columns()
            activations = self.activations
            kernel = select(weight, dtype, activations)
            if activations is not None and kernel.name == "reference":
                activations = None
                kernel = select(weight, dtype)
            ready = (kernel, kernel.prepack(weight, activations))
            self._ready = {**self._ready, dtype: ready}
            if self._compact is None and kernel.name != "reference":  # which works on the buffers themselves
                self._compact = dtype
                self.packed = self.scale = self.zero = None
            return ready

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in float32, bfloat16 or float16 -> [..., out] in the same. Differentiable in x."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self)  # type: ignore[no-any-return]
        return self._matmul(x)

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        kernel, state = self._prepared(x.dtype)
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return kernel.matmul(x, state, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, [out, in] in `dtype` (default float32): what `forward` multiplies by, rounded once."""
        return values_of(self.quantized(), dtype or torch.float32)

    def extra_repr(self) -> str:
        chosen = ", ".join(f"{kernel.name} ({dtype})" for dtype, (kernel, _) in self._ready.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.describe()}, kernel={chosen or 'not chosen yet'}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        with _MOVING:
            self._expand()
            scale = self.scale
            assert scale is not None
            super()._apply(fn, recurse)
            assert self.scale is not None
            if self.scale.dtype != scale.dtype:
                self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _MOVING:
            if self._compact is not None:
                weight = self.quantized()
                for name, tensor in (("packed", weight.packed), ("scale", weight.scale), ("zero", weight.zero)):
                    if tensor is not None:
                        destination[prefix + name] = tensor
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _MOVING:
            self._expand()
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deepcopy: the weight as its buffers."""
        with _MOVING:
            state = {**self.__dict__, "_ready": {}, "_compact": None}
            if self._compact is not None:
                w = self.quantized()
                state["_buffers"] = {**self._buffers, "packed": w.packed, "scale": w.scale, "zero": w.zero}
            return state


class OrderedLinear(QuantLinear):
    """A weight whose columns are not in the order of the inputs (GPTQ's activation order): inputs are sorted first."""

    order: torch.Tensor

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None, activations: str | None = None):
        super().__init__(replace(weight, order=None), bias, activations)
        self.register_buffer("order", weight.order)

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        return super()._matmul(x.index_select(-1, self.order))

    def quantized(self) -> Weight:
        return replace(super().quantized(), order=self.order)


def quant_linear(weight: Weight, bias: torch.Tensor | None = None, activations: str | None = None) -> QuantLinear:
    """The layer for a weight of any kind."""
    return (QuantLinear if weight.order is None else OrderedLinear)(weight, bias, activations)


def _tensors_in(held: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a kernel's state, which is whatever its `prepack` made: tensors, or objects of such."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from _tensors_in(each)
    elif isinstance(held, dict):
        yield from _tensors_in(list(held.values()))
    else:
        slots = (name for base in type(held).__mro__ for name in getattr(base, "__slots__", ()))
        names = (*getattr(held, "__dict__", ()), *slots)
        yield from _tensors_in([getattr(held, name, None) for name in names])


class _Differentiable(torch.autograd.Function):
    """The layer's kernel forwards; backwards the gradient of the input through a weight dequantized for the moment.

    Nothing is kept for the backward pass but the layer: the gradient of a product in x needs no x. The packed weight
    and the bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer._matmul(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None
