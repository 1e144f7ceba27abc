"""compressed-tensors, format *pack-quantized*: W4A16 and W8A16, what vLLM and transformers load.

Reference: package `compressed_tensors`, compressors/pack_quantized/ and quantization/quant_{config,args}.py.
4- and 8-bit weights have had the same bytes in every release; 3, 5, 6 and 7 bits have not: not offered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..spec import CHANNEL, LayerSpec, integer
from ..spec.dtypes import TensorMeta
from .base import Format, as_names, as_object, check_pattern, check_tensors

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight

# The oldest release whose reader the tests run against; the bytes are the same since the first.
_VERSION = "0.17.0"


@dataclass(frozen=True)
class CompressedTensors(Format):
    """weight_packed int32 [out, ceil(in*b/32)], low bits first; weight_scale [out, groups] in the model's
    dtype; weight_zero_point int32 [ceil(out*b/32), groups], packed along out, asymmetric only; weight_shape
    int64 [2].
    """

    name: str = "compressed-tensors"
    quant_method: ClassVar[str | None] = "compressed-tensors"

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        # Readers hold the scale in the model's dtype: any other would be rounded a second time.
        dtype = model_dtype if model_dtype in ("BF16", "F16", "F32") else "BF16"
        return scheme.stored_with(dtype, min_zero=0)

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        if scheme.group_size != CHANNEL and shape[1] % scheme.group_size:
            return f"group size {scheme.group_size} does not divide its {shape[1]} inputs"
        return None

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        out, in_ = shape
        groups = scheme.groups(in_)
        metas = {
            "weight_packed": TensorMeta("I32", (out, -(-in_ * scheme.bits // 32))),
            "weight_scale": TensorMeta(scheme.scale_dtype, (out, groups)),
            "weight_shape": TensorMeta("I64", (2,)),
        }
        if not scheme.symmetric:
            metas["weight_zero_point"] = TensorMeta("I32", (-(-out * scheme.bits // 32), groups))
        return metas

    def pack(self, weight: Weight) -> dict[str, torch.Tensor]:
        import torch

        from ..kernels import pack

        tensors = {
            "weight_packed": weight.packed,
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
        }
        if weight.zero is not None:
            tensors["weight_zero_point"] = pack(weight.zero.t().contiguous(), weight.bits).t().contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec) -> Weight:
        import torch

        from ..kernels import unpack
        from ..kernels.weight import Weight

        if "weight_g_idx" in tensors:
            check_trivial_g_idx(tensors["weight_g_idx"], scheme)
        shape = tensors["weight_shape"].tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise QkitError(f"weight_shape is {shape}, not the shape of a linear weight")
        out, in_ = int(shape[0]), int(shape[1])
        reason = self.check((out, in_), scheme)
        if reason:
            raise QkitError(reason)
        expected = self.out_metas((out, in_), scheme)
        zero = tensors.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int8:  # releases before 0.10 left it unpacked, signed
            expected["weight_zero_point"] = TensorMeta("I8", (out, scheme.groups(in_)))
        check_tensors(tensors, expected)
        if scheme.symmetric or zero is None:
            zero = None
        elif zero.dtype == torch.int8:
            zero = (zero.to(torch.int16) + scheme.mid).to(torch.uint8)
        else:
            zero = unpack(zero.t().contiguous(), scheme.bits, out).t().contiguous()
        return Weight(tensors["weight_packed"], tensors["weight_scale"], zero, scheme.bits, in_)

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        kinds = sorted({_key(scheme) for scheme in schemes.values()})
        by_kind = {kind: [m for m, s in schemes.items() if _key(s) == kind] for kind in kinds}
        for index, kind in enumerate(kinds):
            bits, group_size, symmetric = kind
            channel = group_size == CHANNEL
            groups[f"group_{index}"] = {
                # A class name only where it cannot match a module of another group: readers give the
                # first match, and would unpack with the wrong width.
                "targets": ["Linear"] if len(kinds) == 1 else by_kind[kind],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if channel else "group",
                    "group_size": None if channel else group_size,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "version": _VERSION,
        }

    def parse(self, quantization_config: Mapping[str, Any]) -> CompressedTensorsReader:
        given = quantization_config
        if given.get("kv_cache_scheme"):
            raise QkitError("a quantized KV cache (kv_cache_scheme) is not supported")
        sparsity = as_object(given.get("sparsity_config"), "sparsity_config")
        transform = as_object(given.get("transform_config"), "transform_config")
        if sparsity.get("format", "dense") != "dense" or transform.get("config_groups"):
            raise QkitError("compressed-tensors with sparsity or transforms is not supported")
        groups = as_object(given.get("config_groups"), "config_groups")
        if not groups:
            raise QkitError("the compressed-tensors config has no config_groups")
        targets: dict[str, LayerSpec] = {}
        for name, group in groups.items():
            group = as_object(group, name)
            format_name = group.get("format") or given.get("format")
            if format_name != "pack-quantized":
                raise QkitError(
                    f"compressed-tensors format {format_name!r} is not supported", "supported: pack-quantized"
                )
            scheme = _parse_scheme(name, group)
            targets.update(dict.fromkeys(as_names(group.get("targets"), f"{name}.targets"), scheme))
        ignore = as_names(given.get("ignore"), "ignore")
        for pattern in (*targets, *ignore):
            check_pattern(pattern.removeprefix("re:"))
        return CompressedTensorsReader(targets, ignore, self)


@dataclass(frozen=True)
class CompressedTensorsReader:
    """Which module has which scheme, by the rules of compressed_tensors/utils/match.py."""

    targets: Mapping[str, LayerSpec]
    ignore: tuple[str, ...]
    format: CompressedTensors = field(default_factory=CompressedTensors)
    marker: ClassVar[str] = "weight_packed"
    scale: ClassVar[str] = "weight_scale"
    optional: ClassVar[tuple[str, ...]] = ("weight_g_idx",)

    def scheme(self, module: str) -> LayerSpec | None:
        if any(_matches(module, pattern) for pattern in self.ignore):
            return None
        # Most specific first: exact names, then patterns, then the class.
        for target in sorted(self.targets, key=lambda t: (t.startswith("re:"), t)):
            if _matches(module, target):
                return self.targets[target]
        return self.targets.get("Linear")

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        names = ("weight_packed", "weight_scale", "weight_shape")
        return names if scheme.symmetric else (*names, "weight_zero_point")


def check_trivial_g_idx(g_idx: torch.Tensor, scheme: LayerSpec) -> None:
    """Raises QkitError unless input channel i belongs to group i // group_size."""
    import torch

    expected = torch.arange(g_idx.numel(), dtype=torch.int64)
    expected = torch.zeros_like(expected) if scheme.group_size == CHANNEL else expected // scheme.group_size
    if not torch.equal(g_idx.to(torch.int64).cpu(), expected):
        raise QkitError(
            "its groups are not contiguous (activation order, non-trivial g_idx)",
            "quantize it again with static groups (desc_act false, or actorder 'static')",
        )


def _key(scheme: LayerSpec) -> tuple[int, int, bool]:
    return (scheme.bits, scheme.group_size, scheme.symmetric)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


def _parse_scheme(name: str, group: Mapping[str, Any]) -> LayerSpec:
    weights = as_object(group.get("weights"), "weights")
    if not weights:
        raise QkitError(f"config group {name!r} does not quantize weights")
    if group.get("input_activations") or group.get("output_activations"):
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
    if strategy == "group" and (not isinstance(size, int) or size < 1):
        raise QkitError(f"config group {name!r}: strategy group needs an integer group_size, not {size!r}")
    return integer(
        bits=weights.get("num_bits", 8),
        group_size=int(size) if strategy == "group" and isinstance(size, int) else CHANNEL,
        symmetric=bool(weights.get("symmetric", True)),
    )
