"""ggml tensor types: names, sizes, and their bytes turned into floats. The block decoders are in ggml_blocks.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import QkitError
from .ggml_blocks import DECODERS

if TYPE_CHECKING:
    import torch

# Values per pass: the float32 scratch of one pass (4 MiB) stays in a core's share of the cache.
CHUNK = 1 << 20


@dataclass(frozen=True)
class GgmlType:
    """One ggml type: `block_size` values in `block_bytes` bytes; `plain` names the safetensors dtype of types
    that are no block quantization."""

    name: str
    block_size: int
    block_bytes: int
    plain: str | None = None

    @property
    def readable(self) -> bool:
        return self.plain in ("F32", "F16", "BF16", "F64") or self.name in DECODERS


# Ids of `enum ggml_type` in ggml.h; the removed ids (4, 5, 31-33, 36-38) are unknown on purpose.
GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, "F32"), 1: GgmlType("F16", 1, 2, "F16"),
    2: GgmlType("Q4_0", 32, 18), 3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22), 7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34), 9: GgmlType("Q8_1", 32, 36),
    10: GgmlType("Q2_K", 256, 84), 11: GgmlType("Q3_K", 256, 110), 12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176), 14: GgmlType("Q6_K", 256, 210), 15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66), 17: GgmlType("IQ2_XS", 256, 74), 18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50), 20: GgmlType("IQ4_NL", 32, 18), 21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82), 23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1, "I8"), 25: GgmlType("I16", 1, 2, "I16"),
    26: GgmlType("I32", 1, 4, "I32"), 27: GgmlType("I64", 1, 8, "I64"), 28: GgmlType("F64", 1, 8, "F64"),
    29: GgmlType("IQ1_M", 256, 56), 30: GgmlType("BF16", 1, 2, "BF16"),
    34: GgmlType("TQ1_0", 256, 54), 35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17), 40: GgmlType("NVFP4", 64, 36), 41: GgmlType("Q1_0", 128, 18),
}  # fmt: skip


def readable_types() -> list[str]:
    """Names of the types that `dequantize` handles, in the order of their ids."""
    return [t.name for t in GGML_TYPES.values() if t.readable]


def require_readable(ggml_type: GgmlType, tensor: str) -> None:
    """Raises QkitError where a tensor's type cannot be turned into floats."""
    if not ggml_type.readable:
        raise QkitError(
            f"tensor {tensor} has the ggml type {ggml_type.name}, which qkit does not read",
            f"use a file in one of {', '.join(readable_types())}",
        )


def dequantize(raw: torch.Tensor, ggml_type: GgmlType, out: torch.Tensor) -> None:
    """Decode whole blocks: raw uint8 [bytes] into out float [values], contiguous; rounded once to out.dtype.

    Memory: a few scratch buffers of CHUNK values, whatever the size.
    """
    import torch

    if ggml_type.plain is not None:
        out.copy_(raw.view(_plain_dtype(ggml_type.plain)))
        return
    decode = DECODERS[ggml_type.name]
    blocks = raw.view(-1, ggml_type.block_bytes)
    target = out.view(-1, ggml_type.block_size)
    step = CHUNK // ggml_type.block_size
    direct = out.dtype == torch.float32
    scratch = None if direct else torch.empty(min(step, len(blocks)), ggml_type.block_size)
    for start in range(0, len(blocks), step):
        part = target[start : start + step]
        values = part if scratch is None else scratch[: len(part)]
        decode(blocks[start : start + step], values)
        if not direct:
            part.copy_(values)


def _plain_dtype(name: str) -> torch.dtype:
    from ...spec.dtypes import torch_dtype

    return torch_dtype(name)
