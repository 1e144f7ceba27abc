"""bitsandbytes folders as transformers saves them: NF4, FP4, with and without double quantization, and LLM.int8().

Reference: bitsandbytes functional.py (QuantState.as_dict), nn/modules.py (Linear4bit, Linear8bitLt).
4 bits: weight uint8 [out * in / 2, 1], first code in the high nibble, blocks along the flattened matrix; weight.absmax
float32 [blocks], or uint8 with weight.nested_absmax and weight.nested_quant_map; weight.quant_map float32 [16];
weight.quant_state.bitsandbytes__nf4 uint8: JSON of the shape, the block size and the offset.
8 bits: weight int8 [out, in], SCB float32 [out], weight_format uint8 0; a weight is code * SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..models.config import model_dtype
from ..sources.cast import CastSource
from ..spec import Keep, LayerSpec, Scale, llm_int8, table
from ..spec.dtypes import TensorMeta, dtype_name, torch_dtype
from ..untrusted import parse_json
from .base import Format, as_names

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..sources.types import Source

_STATE = "weight.quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
_NUMBER = 26  # characters that the longest float takes in JSON


@dataclass(frozen=True)
class BitsAndBytes(Format):
    """The scheme says nf4, fp4 or int8, and whether scales are themselves quantized. One folder holds one of them."""

    name: str = "bnb"
    dtype: str = "bfloat16"  # what bitsandbytes dequantizes to: the model's own type
    quant_method: ClassVar[str | None] = "bitsandbytes"
    kinds: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "llm.int8")
    default_scheme: ClassVar[str] = "nf4"
    calibrated: ClassVar[str] = "rtn"
    by_rows: ClassVar[bool] = True

    def bound(self, source: Source) -> BitsAndBytes:
        dtype = model_dtype(source.config)
        return BitsAndBytes(dtype=str(torch_dtype(dtype)).removeprefix("torch."))

    def view(self, source: Source) -> Source:
        return CastSource(source)

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        if scheme.kind != "llm.int8" and scheme.group_size not in BLOCK_SIZES:
            raise QkitError(
                f"bitsandbytes has no blocks of {scheme.group_size}", "use " + ", ".join(map(str, BLOCK_SIZES))
            )
        return scheme

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        if scheme.kind != "llm.int8" and shape[1] % scheme.group_size:
            return (
                f"blocks of {scheme.group_size} do not divide its {shape[1]} inputs, so that they would run across rows"
            )
        return None

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
        """Experts stay as they are: transformers 5 loads them as one tensor, which bitsandbytes passes over."""
        kinds = {(c.kind, c.scale.over is None) for c in choices.values() if isinstance(c, LayerSpec)}
        if len(kinds) > 1:
            raise QkitError("bitsandbytes has one scheme for the whole model", "use one --scheme")
        kept = Keep("an expert, which bitsandbytes does not quantize in transformers")
        experts = [n for n, c in choices.items() if isinstance(c, LayerSpec) and ".experts." in n]
        if not experts:
            return choices, []
        notes = [
            f"WARNING: {len(experts)} matrices of experts stay at 16 bits: transformers loads them fused, and "
            "bitsandbytes passes over them; format gguf, gptq or compressed-tensors quantizes them"
        ]
        return {**choices, **dict.fromkeys(experts, kept)}, notes

    def once(self, local: str) -> bool:
        return local.startswith(_STATE)

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        out, in_ = shape
        if scheme.kind == "llm.int8":
            return {
                "weight": TensorMeta("I8", (out, in_)),
                "SCB": TensorMeta("F32", (out,)),
                "weight_format": TensorMeta("U8", ()),
            }
        blocks = out * in_ // scheme.group_size
        double = scheme.scale.over is not None
        metas = {"weight": TensorMeta("U8", (out * in_ // 2, 1))}
        metas["weight.absmax"] = TensorMeta("U8" if double else "F32", (blocks,))
        if double:
            metas["weight.nested_absmax"] = TensorMeta("F32", (-(-blocks // _NESTED_BLOCK),))
            metas["weight.nested_quant_map"] = TensorMeta("F32", (256,))
        metas["weight.quant_map"] = TensorMeta("F32", (16,))
        metas[_STATE + scheme.kind] = TensorMeta("U8", (len(_describe(shape, scheme, 0.0, self.dtype)),))
        return metas

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        import torch

        from ..kernels.codes import codes_of, signed
        from ..kernels.weight import TABLES

        codes = codes_of(weight)
        if weight.kind == "int":
            # The scale was a float16 before it was divided: `Weight` has scales that multiply codes.
            absmax = (weight.scale.view(-1) * 127).half().float()
            return {"weight": signed(codes), "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        pairs = codes.view(-1, 2)
        tensors = {
            "weight": ((pairs[:, 0] << 4) | pairs[:, 1]).view(-1, 1),
            "weight.absmax": weight.scale.reshape(-1),
        }
        nested = weight.nested
        if nested is not None:
            tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"] = nested.absmax, nested.table
        tensors["weight.quant_map"] = torch.tensor(TABLES[weight.kind])
        shape = (of or weight.out_features, weight.in_features)
        text = _describe(shape, weight.spec, 0.0 if nested is None else nested.offset, self.dtype)
        tensors[_STATE + weight.kind] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        import torch

        from ..kernels import pack
        from ..kernels.weight import Weight

        if scheme.kind == "llm.int8":
            return _unpack_int8(tensors)
        state = _state(tensors[_STATE + scheme.kind])
        out, in_ = state["shape"]
        out = rows or out
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

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        if scheme.kind == "llm.int8":
            return super().shape(source, module, scheme)
        out, in_ = _state(source.read(f"{module}.{_STATE}{scheme.kind}"))["shape"]
        return out, in_

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The keys that transformers writes (utils/quantization_config.py, BitsAndBytesConfig)."""
        spec = next(iter(schemes.values()))
        four = spec.kind != "llm.int8"
        return {
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_compute_dtype": self.dtype if four else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": spec.kind if four else "fp4",
            "bnb_4bit_use_double_quant": spec.scale.over is not None,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(ignored),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "quant_method": "bitsandbytes",
        }

    def parse(self, quantization_config: Mapping[str, Any]) -> BitsAndBytesReader:
        given = quantization_config
        as_names(given.get("llm_int8_skip_modules"), "llm_int8_skip_modules")
        if given.get("load_in_8bit", given.get("_load_in_8bit")):
            return BitsAndBytesReader(llm_int8())
        if not given.get("load_in_4bit", given.get("_load_in_4bit")):
            raise QkitError("this bitsandbytes folder says neither 4 nor 8 bits", "is its config.json whole?")
        kind = given.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise QkitError(f"bnb_4bit_quant_type {kind!r} is not supported", "supported: nf4, fp4")
        if given.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise QkitError(
                f"bnb_4bit_quant_storage {given['bnb_4bit_quant_storage']!r} is not supported", "supported: uint8"
            )
        over = Scale((1, _NESTED_BLOCK), "F32") if given.get("bnb_4bit_use_double_quant") else None
        return BitsAndBytesReader(table(kind, scale_dtype="F32", over=over))


@dataclass(frozen=True)
class BitsAndBytesReader:
    """The tensors say which modules are quantized: those that the config skips have none of these."""

    spec: LayerSpec
    format: BitsAndBytes = BitsAndBytes()

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.scale,)

    @property
    def scale(self) -> str:
        return "SCB" if self.spec.kind == "llm.int8" else "weight.absmax"

    @property
    def optional(self) -> tuple[str, ...]:
        return ("weight_format",) if self.spec.kind == "llm.int8" else ()

    def scheme(self, module: str) -> LayerSpec | None:
        return self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        if scheme.kind == "llm.int8":
            return ("weight", "SCB")
        names = ("weight", "weight.absmax", "weight.quant_map", _STATE + scheme.kind)
        return (*names, "weight.nested_absmax", "weight.nested_quant_map") if scheme.scale.over else names


def _describe(shape: tuple[int, int], spec: LayerSpec, offset: float, dtype: str) -> bytes:
    """A quant_state's JSON, padded with spaces: its length must not depend on the offset."""
    state: dict[str, Any] = {
        "quant_type": spec.kind, "blocksize": spec.group_size or shape[1], "dtype": dtype, "shape": list(shape),
    }  # fmt: skip
    if spec.scale.over is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
    room = len(json.dumps(state)) + _NUMBER
    state["nested_offset"] = offset
    return json.dumps(state).encode().ljust(room)


def _unpack_int8(tensors: Mapping[str, torch.Tensor]) -> Weight:
    import torch

    from ..kernels import pack
    from ..kernels.codes import unsigned
    from ..kernels.weight import Weight

    codes = tensors["weight"]
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise QkitError(f"weight is {dtype_name(codes.dtype)} {list(codes.shape)}, not I8 in two dimensions")
    rows = tensors.get("weight_format")
    if rows is not None and (rows.numel() != 1 or int(rows) != 0):
        raise QkitError("weight_format is not 0 (rows)", "save the model again with a current bitsandbytes")
    absmax = _typed(tensors, "SCB", "F32", codes.shape[0])
    return Weight(pack(unsigned(codes), 8), absmax.view(-1, 1) / 127, None, 8, codes.shape[1])


def _state(raw: torch.Tensor) -> dict[str, Any]:
    """The JSON of a quant_state. Raises QkitError unless it has a shape and a block size that can be."""
    try:
        state = parse_json(bytes(raw.tolist()))
    except (ValueError, TypeError) as error:
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
