"""Values on their way between processes: tensors are sent as arrays, whose bytes a pickler can pass on uncopied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ..spec.dtypes import TensorMeta, dtype_name, torch_dtype
from ..storage.writer import tensor_bytes


class Wire:
    """A value with tensors in it: in containers, and in objects of qkit's. What arrives shares its memory with whatever
    brought it: it is not to be changed."""

    def __init__(self, value: Any):
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": _mapped(self.value, torch.Tensor, _bytes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = _mapped(state["value"], _Bytes, _tensor)


@dataclass(frozen=True)
class _Bytes:
    meta: TensorMeta
    data: numpy.ndarray[Any, Any]


def _bytes(tensor: torch.Tensor) -> _Bytes:
    meta = TensorMeta(dtype_name(tensor.dtype), tuple(tensor.shape))
    return _Bytes(meta, numpy.frombuffer(tensor_bytes(tensor), dtype=numpy.uint8))


def _tensor(sent: _Bytes) -> torch.Tensor:
    meta = sent.meta
    if not meta.numel:
        return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(sent.data, dtype=torch_dtype(meta.dtype)).view(meta.shape)


def _mapped(value: Any, kind: type, leaf: Callable[[Any], Any]) -> Any:
    """The value with leaf(x) for each x of that kind in it."""
    if isinstance(value, kind):
        return leaf(value)
    if isinstance(value, dict):
        return {key: _mapped(each, kind, leaf) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, kind, leaf) for each in value)
    if type(value).__module__.startswith("qkit.") and hasattr(value, "__dict__"):
        made = copy(value)
        made.__dict__.update({name: _mapped(each, kind, leaf) for name, each in vars(made).items()})
        return made
    return value
