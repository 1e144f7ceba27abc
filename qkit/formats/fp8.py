"""FP8 weights as tensors: what compressed-tensors' *float-quantized* and the `fp8` folders of DeepSeek and Qwen share.

weight F8_E4M3 [out, in]; a scale per output channel [out, 1], per tensor [1], per group [out, groups] or per block
[ceil(out / rows), in / columns], float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..spec import Activations, LayerSpec, fp8
from ..spec.dtypes import FLOATS, TensorMeta, dtype_name
from .base import ReadOnly, as_names

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight


def check(shape: tuple[int, int], spec: LayerSpec) -> str | None:
    columns = spec.scale.block[1]
    if columns and shape[1] % columns:
        return f"blocks of {columns} do not divide its {shape[1]} inputs"
    return None


def metas(shape: tuple[int, int], spec: LayerSpec, scale: str) -> dict[str, TensorMeta]:
    """scale: the local name of the scale."""
    grid = (1,) if spec.scale.block == (0, 0) else spec.scale.shape(shape)
    return {"weight": TensorMeta("F8_E4M3", shape), scale: TensorMeta(spec.scale_dtype, grid)}


def pack(weight: Weight, spec: LayerSpec, scale: str) -> dict[str, torch.Tensor]:
    import torch

    from ..kernels.codes import codes_of

    values = codes_of(weight).view(torch.float8_e4m3fn)
    return {"weight": values, scale: weight.scale.view(1) if spec.scale.block == (0, 0) else weight.scale}


def unpack(tensors: Mapping[str, torch.Tensor], spec: LayerSpec, scale: str) -> Weight:
    import torch

    from ..kernels import pack
    from ..kernels.weight import Weight

    values, scales = tensors["weight"], tensors[scale]
    if dtype_name(values.dtype) != "F8_E4M3" or values.dim() != 2:
        raise QkitError(f"weight is {dtype_name(values.dtype)} {list(values.shape)}, not F8_E4M3 in two dimensions")
    shape = (values.shape[0], values.shape[1])
    reason = check(shape, spec)
    if reason:
        raise QkitError(reason)
    grid = spec.scale.shape(shape)
    if dtype_name(scales.dtype) not in FLOATS or scales.numel() != grid[0] * grid[1]:
        raise QkitError(f"{scale} is {dtype_name(scales.dtype)} {list(scales.shape)}, its config says {list(grid)}")
    scales = scales.view(grid)
    if scales.dtype == torch.float64:
        scales = scales.float()
    rows = spec.scale.block[0] or shape[0]
    return Weight(pack(values.view(torch.uint8), 8), scales, None, 8, shape[1], "fp8", scale_rows=rows)


@dataclass(frozen=True)
class BlockFp8(ReadOnly):
    """Folders whose quant_method is "fp8" (transformers' FineGrainedFP8): weight_scale_inv, which multiplies, per block
    of 128 x 128 or whatever weight_block_size says. Read, not written."""

    name: str = "fp8"
    quant_method: ClassVar[str | None] = "fp8"

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        return unpack(tensors, scheme, "weight_scale_inv")

    def parse(self, quantization_config: Mapping[str, Any]) -> BlockFp8Reader:
        given = quantization_config
        block = given.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
            raise QkitError(
                f"fp8 with weight_block_size {block!r} is not supported", "supported: [128, 128] and the like"
            )
        if given.get("fmt", "e4m3") != "e4m3" or given.get("activation_scheme", "dynamic") != "dynamic":
            raise QkitError(
                f"fp8 with fmt {given.get('fmt')!r} and activation_scheme {given.get('activation_scheme')!r} is not "
                "supported",
                "supported: e4m3, dynamic",
            )
        spec = replace(fp8((block[0], block[1]), "F32"), input=Activations("float", 8))
        return BlockFp8Reader(spec, as_names(given.get("modules_to_not_convert"), "modules_to_not_convert"))


@dataclass(frozen=True)
class BlockFp8Reader:
    """Every module with a weight_scale_inv is quantized, but for those the config names."""

    spec: LayerSpec
    kept: tuple[str, ...]
    format: BlockFp8 = BlockFp8()
    markers: ClassVar[tuple[str, ...]] = ("weight_scale_inv",)
    scale: ClassVar[str] = "weight_scale_inv"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec | None:
        return None if module in self.kept else self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("weight", "weight_scale_inv")
