"""*int-quantized*: W8A8 (compressors/naive_quantized): int8 weights with a scale per output channel, or one for all;
inputs are rounded to 8 bits as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec import CHANNEL, Activations, LayerSpec, integer
from ...spec.dtypes import TensorMeta
from ..base import check_tensors

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight

NAME = "int-quantized"
OPTIONAL = ("input_scale",)


def required(spec: LayerSpec) -> tuple[str, ...]:
    return ("weight", "weight_scale")


def check(shape: tuple[int, int], spec: LayerSpec) -> str | None:
    return None


def metas(shape: tuple[int, int], spec: LayerSpec) -> dict[str, TensorMeta]:
    return {"weight": TensorMeta("I8", shape), "weight_scale": TensorMeta(spec.scale_dtype, (shape[0], 1))}


def pack(weight: Weight, spec: LayerSpec) -> dict[str, torch.Tensor]:
    from ...kernels.codes import codes_of, signed

    return {"weight": signed(codes_of(weight)), "weight_scale": weight.scale}


def unpack(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> Weight:

    from ...kernels import pack
    from ...kernels.codes import unsigned
    from ...kernels.weight import Weight

    codes, scale = tensors["weight"], tensors["weight_scale"]
    if codes.dim() != 2:
        raise QkitError(f"weight has shape {list(codes.shape)}, not two dimensions")
    if scale.numel() == 1:  # of the whole tensor
        scale = scale.view(1, 1).expand(codes.shape[0], 1).contiguous()
    check_tensors({"weight": codes, "weight_scale": scale}, metas((codes.shape[0], codes.shape[1]), spec))
    return Weight(pack(unsigned(codes), 8), scale, None, 8, codes.shape[1])


def arguments(spec: LayerSpec) -> dict[str, Any]:
    """`weights` of a config group."""
    return {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
        "actorder": None,
    }  # fmt: skip


def parse(name: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> LayerSpec:
    """The spec of a config group's `weights` and `input_activations`. Raises QkitError for what is not read."""
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if bits != 8 or kind not in ("int", None) or strategy not in ("channel", "tensor"):
        raise QkitError(
            f"config group {name!r}: {bits}-bit {kind} weights with strategy {strategy!r} are not supported in {NAME}",
            "supported: 8-bit int weights with strategy channel or tensor",
        )
    if weights.get("symmetric") is False:
        raise QkitError(f"config group {name!r}: asymmetric {NAME} weights are not supported", "supported: symmetric")
    spec = integer(8, CHANNEL)
    if not inputs:
        return spec
    dynamic = inputs.get("dynamic") in (True, "local")
    per = "token" if dynamic and inputs.get("strategy") in ("token", None) else "tensor"
    return replace(spec, input=Activations("int", 8, dynamic, per))
