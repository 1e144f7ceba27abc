"""bitsandbytes' 4-bit folders (NF4, FP4), with and without double quantization: read, not written.

Reference: bitsandbytes functional.py (QuantState.as_dict), as transformers saves them.
weight uint8 [out * in / 2, 1], first code in the high nibble, blocks along the flattened matrix; weight.absmax float32
[blocks], or uint8 with weight.nested_absmax and weight.nested_quant_map; weight.quant_map float32 [16];
weight.quant_state.bitsandbytes__nf4 uint8: JSON of the shape, the block size and the offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..spec import LayerSpec, Scale, table
from ..spec.dtypes import dtype_name
from .base import ReadOnly, as_names

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight

_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BitsAndBytes(ReadOnly):
    """The scheme says nf4 or fp4 and whether scales are themselves quantized; block and shape stand in the tensors."""

    name: str = "bnb"
    quant_method: ClassVar[str | None] = "bitsandbytes"

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec) -> Weight:
        import torch

        from ..kernels import pack
        from ..kernels.weight import Weight

        state = _state(tensors[_STATE + scheme.kind])
        out, in_ = state["shape"]
        block = state["blocksize"]
        if in_ % block:
            raise QkitError(f"blocks of {block} do not divide its {in_} inputs, so that they run across rows")
        raw = _typed(tensors, "weight", "U8", out * in_ // 2)
        codes = torch.stack((raw >> 4, raw & 15), dim=1).view(out, in_)
        _check_table(_typed(tensors, "weight.quant_map", "F32", 16), scheme.kind)
        groups = in_ // block
        nested = None
        if scheme.scale.over is None:
            scale = _typed(tensors, "weight.absmax", "F32", out * groups)
        else:
            scale = _typed(tensors, "weight.absmax", "U8", out * groups)
            nested = _nested(tensors, state, out * groups)
        return Weight(pack(codes, 4), scale.view(out, groups), None, 4, in_, scheme.kind, nested=nested)

    def parse(self, quantization_config: Mapping[str, Any]) -> BitsAndBytesReader:
        given = quantization_config
        if not given.get("load_in_4bit", given.get("_load_in_4bit")):
            raise QkitError("8-bit bitsandbytes folders are not supported", "supported: 4-bit ones (nf4, fp4)")
        kind = given.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise QkitError(f"bnb_4bit_quant_type {kind!r} is not supported", "supported: nf4, fp4")
        over = Scale((1, 256), "F32") if given.get("bnb_4bit_use_double_quant") else None
        as_names(given.get("llm_int8_skip_modules"), "llm_int8_skip_modules")
        return BitsAndBytesReader(table(kind, scale_dtype="F32", over=over))


@dataclass(frozen=True)
class BitsAndBytesReader:
    """The tensors say which modules are quantized: those that the config skips have none of these."""

    spec: LayerSpec
    format: BitsAndBytes = BitsAndBytes()
    markers: ClassVar[tuple[str, ...]] = ("weight.absmax",)
    scale: ClassVar[str] = "weight.absmax"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec | None:
        return self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        names = ("weight", "weight.absmax", "weight.quant_map", _STATE + scheme.kind)
        return (*names, "weight.nested_absmax", "weight.nested_quant_map") if scheme.scale.over else names


def _state(raw: torch.Tensor) -> dict[str, Any]:
    """The JSON of a quant_state. Raises QkitError unless it has a shape and a block size that can be."""
    try:
        state = json.loads(bytes(raw.tolist()).decode("utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise QkitError(f"its quant_state is not valid JSON: {error}") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    block = state.get("blocksize") if isinstance(state, dict) else None
    numbers = [*shape, block] if isinstance(shape, list) and len(shape) == 2 else [0]
    if any(type(n) is not int or not 0 < n < 1 << 31 for n in numbers):
        raise QkitError(f"its quant_state has shape {shape!r} and blocksize {block!r}")
    return dict(state)


def _nested(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], count: int) -> Any:
    from ..kernels.weight import Nested

    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise QkitError(f"its quant_state has nested_blocksize {block!r} and nested_offset {offset!r}")
    absmax = _typed(tensors, "weight.nested_absmax", "F32", -(-count // block))
    return Nested(_typed(tensors, "weight.nested_quant_map", "F32", 256), absmax, block, float(offset))


def _typed(tensors: Mapping[str, torch.Tensor], local: str, dtype: str, count: int) -> torch.Tensor:
    """A tensor, flat. Raises QkitError for another type or number of elements."""
    tensor = tensors[local]
    if dtype_name(tensor.dtype) != dtype or tensor.numel() != count:
        raise QkitError(
            f"tensor {local!r} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, expected {count} of {dtype}",
            "the config, the quant_state and the tensors have to belong together",
        )
    return tensor.flatten()


def _check_table(found: torch.Tensor, kind: str) -> None:
    import torch

    from ..kernels.weight import TABLES

    if not torch.allclose(found, torch.tensor(TABLES[kind]), atol=1e-6):
        raise QkitError(f"its quant_map is not the table of {kind}", "quantize the original checkpoint anew")
