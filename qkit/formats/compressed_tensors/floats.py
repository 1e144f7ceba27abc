"""*float-quantized*: FP8 weights (compressors/naive_quantized), with a scale per channel, tensor, group or block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec import Activations, LayerSpec, fp8
from ...spec.dtypes import TensorMeta
from .. import fp8 as codec

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight

NAME = "float-quantized"
OPTIONAL = ("input_scale",)
_STRATEGIES = ("channel", "tensor", "group", "block")


def required(spec: LayerSpec) -> tuple[str, ...]:
    return ("weight", "weight_scale")


def check(shape: tuple[int, int], spec: LayerSpec) -> str | None:
    return codec.check(shape, spec)


def metas(shape: tuple[int, int], spec: LayerSpec) -> dict[str, TensorMeta]:
    return codec.metas(shape, spec, "weight_scale")


def pack(weight: Weight, spec: LayerSpec) -> dict[str, torch.Tensor]:
    return codec.pack(weight, spec, "weight_scale")


def unpack(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> Weight:
    return codec.unpack(tensors, spec, "weight_scale")


def arguments(spec: LayerSpec) -> dict[str, Any]:
    """`weights` of a config group."""
    rows, columns = spec.scale.block
    strategy = "tensor" if not rows else "channel" if not columns else "group" if rows == 1 else "block"
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": columns if strategy == "group" else None,
        "block_structure": [rows, columns] if strategy == "block" else None,
        "dynamic": False,
        "actorder": None,
    }


def parse(name: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> LayerSpec:
    """The spec of a config group's `weights` and `input_activations`. Raises QkitError for what is not read."""
    strategy, size, block = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if weights.get("num_bits", 8) != 8 or weights.get("type") != "float" or strategy not in _STRATEGIES:
        raise QkitError(
            f"config group {name!r}: {weights.get('num_bits')}-bit {weights.get('type')} weights with strategy "
            f"{strategy!r} are not supported",
            "supported: 8-bit float weights with strategy " + ", ".join(_STRATEGIES),
        )
    blocks = {"channel": [1, 0], "tensor": [0, 0], "group": [1, size], "block": block}
    found = blocks[strategy]
    if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 0 for n in found):
        raise QkitError(f"config group {name!r}: strategy {strategy} needs a size, not {found!r}")
    spec = fp8((found[0], found[1]))
    if not inputs:
        return spec
    dynamic = inputs.get("dynamic") in (True, "local")
    per = "token" if dynamic and inputs.get("strategy") in ("token", "group", None) else "tensor"
    return replace(spec, input=Activations("float", 8, dynamic, per))
