"""*pack-quantized*: W4A16 and W8A16 (compressors/pack_quantized). 4- and 8-bit weights have had the same bytes in every
release; 3, 5, 6 and 7 bits have not: not offered.

weight_packed int32 [out, ceil(in*b/32)], low bits first; weight_scale [out, groups] in the model's dtype;
weight_zero_point int32 [ceil(out*b/32), groups], packed along out, asymmetric only; weight_shape int64 [2].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec import CHANNEL, LayerSpec, integer
from ...spec.dtypes import TensorMeta
from ..base import check_tensors, column_order, in_order

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight

NAME = "pack-quantized"
OPTIONAL = ("weight_g_idx",)


def required(spec: LayerSpec) -> tuple[str, ...]:
    names = ("weight_packed", "weight_scale", "weight_shape")
    return names if spec.symmetric else (*names, "weight_zero_point")


def check(shape: tuple[int, int], spec: LayerSpec) -> str | None:
    if spec.group_size != CHANNEL and shape[1] % spec.group_size:
        return f"group size {spec.group_size} does not divide its {shape[1]} inputs"
    return None


def metas(shape: tuple[int, int], spec: LayerSpec) -> dict[str, TensorMeta]:
    out, in_ = shape
    groups = spec.groups(in_)
    found = {
        "weight_packed": TensorMeta("I32", (out, -(-in_ * spec.bits // 32))),
        "weight_scale": TensorMeta(spec.scale_dtype, (out, groups)),
        "weight_shape": TensorMeta("I64", (2,)),
    }
    if not spec.symmetric:
        found["weight_zero_point"] = TensorMeta("I32", (-(-out * spec.bits // 32), groups))
    return found


def pack(weight: Weight, spec: LayerSpec) -> dict[str, torch.Tensor]:
    import torch

    from ...kernels import pack

    tensors = {
        "weight_packed": weight.packed,
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = pack(weight.zero.t().contiguous(), weight.bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> Weight:
    import torch

    from ...kernels import unpack
    from ...kernels.weight import Weight

    out, in_ = stored_shape(tensors["weight_shape"])
    reason = check((out, in_), spec)
    if reason:
        raise QkitError(reason)
    expected = metas((out, in_), spec)
    zero = tensors.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int8:  # releases before 0.10 left it unpacked, signed
        expected["weight_zero_point"] = TensorMeta("I8", (out, spec.groups(in_)))
    check_tensors(tensors, expected)
    if spec.symmetric or zero is None:
        zero = None
    elif zero.dtype == torch.int8:
        zero = (zero.to(torch.int16) + spec.mid).to(torch.uint8)
    else:
        zero = unpack(zero.t().contiguous(), spec.bits, out).t().contiguous()
    packed, order = tensors["weight_packed"], None
    if "weight_g_idx" in tensors:
        order = column_order(tensors["weight_g_idx"], spec)
        if order is not None:
            packed = in_order(packed, spec.bits, order)
    return Weight(packed, tensors["weight_scale"], zero, spec.bits, in_, order=order)


def stored_shape(weight_shape: torch.Tensor) -> tuple[int, int]:
    """[out, in] of a weight. Raises QkitError for what is none."""
    given = weight_shape.tolist()
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in given):
        raise QkitError(f"weight_shape is {str(given)[:60]}, not the shape of a linear weight")
    return given[0], given[1]


def arguments(spec: LayerSpec) -> dict[str, Any]:
    """`weights` of a config group."""
    channel = spec.group_size == CHANNEL
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else spec.group_size,
        "dynamic": False,
        "actorder": None,
    }


def parse(name: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> LayerSpec:
    """The spec of a config group's `weights` and `input_activations`. Raises QkitError for what is not read."""
    if inputs:
        raise QkitError(f"config group {name!r} quantizes activations", "supported: weights only, W4A16, W8A16")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if size not in (None, -1) else "channel"
    kind = weights.get("type", "int")
    if kind != "int" or strategy not in ("group", "channel"):
        raise QkitError(
            f"config group {name!r}: {kind} weights with strategy {strategy!r} are not supported",
            "supported: int weights with strategy group or channel",
        )
    bits = weights.get("num_bits", 8)
    if bits not in (4, 8):
        raise QkitError(
            f"config group {name!r}: {bits}-bit weights are not supported",
            "supported: 4 and 8 bits, which all releases store alike",
        )
    if strategy == "group" and (not isinstance(size, int) or size < 1):
        raise QkitError(f"config group {name!r}: strategy group needs an integer group_size, not {size!r}")
    return integer(
        bits=bits,
        group_size=int(size) if strategy == "group" and isinstance(size, int) else CHANNEL,
        symmetric=bool(weights.get("symmetric", True)),
    )
