"""`QuantLinear`: an nn.Linear whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..formats.base import Packed
from ..kernels import pack
from ..kernels.select import Kernel, Weight, select
from ..scheme import QTensor, Scheme


class QuantLinear(nn.Module):
    """y = x @ dequantized(weight).T + bias, computed by the first kernel that supports it.

    Buffers, all in state_dict: packed int32 [out, ceil(in*bits/32)], scale [out, groups] in the type it was
    stored with (a cast of the module does not round it), zero uint8 [out, groups] or None, bias [out] or None.
    The kernel is chosen at the first call, for the input's dtype and the device the weight is on then.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None):
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.packed.shape[0]
        self.scheme: Scheme = weight.scheme
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(self.out_features,)}")
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", bias)
        # act dtype -> kernel and its view of the weight. Derived from the buffers: dropped when they change.
        self._ready: dict[torch.dtype, tuple[Kernel, Any]] = {}

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: torch.Tensor | None = None) -> QuantLinear:
        """A layer with the weight `q` [out, in]; the codes are packed, the rest is shared."""
        return cls(Packed(pack(q.codes, q.scheme.bits), q.scale, q.zero, q.codes.shape[1], q.scheme), bias)

    def select(self, dtype: torch.dtype) -> Kernel:
        """The kernel for activations of `dtype`, on the device where the weight is now."""
        return self._prepared(dtype)[0]

    def _prepared(self, dtype: torch.dtype) -> tuple[Kernel, Any]:
        ready = self._ready.get(dtype)
        if ready is None:
            weight = Weight(self.packed, self.scale, self.zero, self.scheme.bits, self.in_features)
            kernel = select(weight, dtype)
            ready = self._ready[dtype] = (kernel, kernel.prepack(weight, None))
        return ready

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in float32, bfloat16 or float16 -> [..., out] in the same."""
        kernel, state = self._prepared(x.dtype)
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return kernel.matmul(x, state, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, [out, in] in `dtype` (default float32): what `forward` multiplies by, rounded once."""
        return self.qtensor().dequantize(dtype)

    def qtensor(self) -> QTensor:
        return Packed(self.packed, self.scale, self.zero, self.in_features, self.scheme).unpack()

    def extra_repr(self) -> str:
        chosen = ", ".join(f"{kernel.name} ({dtype})" for dtype, (kernel, _) in self._ready.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.describe()}, kernel={chosen or 'not chosen yet'}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._ready = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}
