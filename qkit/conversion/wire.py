"""Values on their way between processes: tensors are sent as bytes that nobody copies."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from ..spec.dtypes import TensorMeta, dtype_name, torch_dtype
from ..storage.writer import tensor_bytes


class Wire:
    """A value with tensors in it. What arrives shares its memory with whatever brought it: it is not to be changed."""

    def __init__(self, value: Any):
        self.value = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(self.value)
        return _arrived, (stream.getvalue(), *buffers)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        data = tensor_bytes(value)
        return _tensor, (TensorMeta(dtype_name(value.dtype), tuple(value.shape)), pickle.PickleBuffer(data))


def _arrived(pickled: bytes, *buffers: Any) -> Wire:
    return Wire(pickle.loads(pickled, buffers=buffers))


def _tensor(meta: TensorMeta, data: Any) -> torch.Tensor:
    import warnings

    if not meta.numel:
        return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch_dtype(meta.dtype)).view(meta.shape)
