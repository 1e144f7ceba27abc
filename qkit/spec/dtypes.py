"""Names and sizes of tensor types, without importing torch: a plan is made before torch is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The names are those of the safetensors header, which every part of qkit uses.
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
_NAMED = {"float32": "F32", "fp32": "F32", "bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16"}
FLOATS = ("F64", "F32", "F16", "BF16")
E4M3_MAX = 448.0  # the largest number of F8_E4M3


@dataclass(frozen=True)
class TensorMeta:
    """What is known of a tensor before it is read: dtype (safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for a safetensors dtype name ("BF16" -> torch.bfloat16)."""
    import torch

    return getattr(torch, _TORCH[name])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors dtype name for a torch dtype (torch.bfloat16 -> "BF16")."""
    text = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH.items() if torch_name == text)


def named_dtype(value: object) -> str | None:
    """What a config or a user calls a float type ("bfloat16", "torch.float16", "fp32", torch.bfloat16) -> "BF16", ...;
    None for anything else."""
    return _NAMED.get(str(value).removeprefix("torch.").lower())
