"""compressed-tensors: what vLLM and transformers load. One folder may hold several formats, a module's by its group.

Reference: package `compressed_tensors`, compressors/ and quantization/quant_{config,args}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import QkitError
from ...models.families import TOWERS
from ...spec import Keep, LayerSpec
from ...spec.dtypes import TensorMeta
from ..base import Format, as_names, as_object, check_pattern, matrix_shape, pattern_matches
from . import cache, floats, int8, integers
from .fp4 import MXFP4, NVFP4

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight
    from ...sources.types import Source

# The oldest release whose reader the tests run against; the bytes are the same since the first.
_VERSION = "0.17.0"
# How a kind of weight is stored: modules with NAME, OPTIONAL, required, check, metas, pack, unpack, arguments, parse.
CODECS: dict[str, Any] = {"int": integers, "w8a8": int8, "fp8": floats, "nvfp4": NVFP4, "mxfp4": MXFP4}


def codec(spec: LayerSpec) -> Any:
    """Raises QkitError for a kind of weight that the format does not hold here."""
    kind = "w8a8" if spec.kind == "int" and spec.input is not None else spec.kind
    if kind not in CODECS:
        raise QkitError(f"compressed-tensors does not hold {kind} weights here", "known: " + ", ".join(CODECS))
    return CODECS[kind]


@dataclass(frozen=True)
class CompressedTensors(Format):
    """The tensors of a module are those of its codec."""

    name: str = "compressed-tensors"
    quant_method: ClassVar[str | None] = "compressed-tensors"
    holds_head: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("int", "fp8", "nvfp4", "mxfp4")
    kv_caches: ClassVar[tuple[str, ...]] = (cache.FP8,)

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        if codec(scheme) in (NVFP4, MXFP4):
            return scheme
        if scheme.bits not in (4, 8):
            raise QkitError(
                f"compressed-tensors has {scheme.bits}-bit weights, but each release packs them in another way",
                "use format gptq, or 4 bits",
            )
        # Readers hold the scale in the model's dtype: any other would be rounded a second time.
        dtype = model_dtype if model_dtype in ("BF16", "F16", "F32") else "BF16"
        return scheme.stored_with(dtype, min_zero=0)

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        found: str | None = codec(scheme).check(shape, scheme)
        return found

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
        """transformers and vLLM hold the experts of a layer as one, and read all with the scheme of the first."""
        experts = {c: name for name, c in choices.items() if ".experts." in name and isinstance(c, LayerSpec)}
        if len(experts) > 1:
            one, other = list(experts.items())[:2]
            raise QkitError(
                f"experts are stored in one scheme, not in {one[0].describe()} ({one[1]}) and {other[0].describe()} "
                f"({other[1]}): clients would read both as one",
                "give '*.experts.*' one scheme, or use format gguf",
            )
        return choices, []

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        found: dict[str, TensorMeta] = codec(scheme).metas(shape, scheme)
        return found

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        spec = scheme or weight.spec
        found: dict[str, torch.Tensor] = codec(spec).pack(weight, spec)
        if of is not None and "weight_shape" in found:
            found["weight_shape"] = found["weight_shape"].new_tensor([of, weight.in_features])
        return found

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        if rows is not None and "weight_shape" in tensors:
            shape = tensors["weight_shape"]
            tensors = {**tensors, "weight_shape": shape.new_tensor([rows, *shape.tolist()[1:]])}
        found: Weight = codec(scheme).unpack(tensors, scheme)
        return found

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        found = codec(scheme)
        if found is integers:
            return integers.stored_shape(source.read(f"{module}.weight_shape"))
        if found in (NVFP4, MXFP4):
            out, half = matrix_shape(source, f"{module}.weight_packed")
            return out, 2 * half
        return super().shape(source, module, scheme)

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        by_kind: dict[tuple[Any, ...], list[str]] = {}
        for module, scheme in schemes.items():
            kind = (codec(scheme).NAME, scheme.bits, scheme.scale.block, scheme.symmetric, scheme.input is not None)
            by_kind.setdefault(kind, []).append(module)
        groups: dict[str, Any] = {}
        for index, kind in enumerate(sorted(by_kind)):
            modules = by_kind[kind]
            groups[f"group_{index}"] = {
                # A class name only where it cannot match a module of another group: readers give the
                # first match, and would unpack with the wrong width.
                "targets": ["Linear", *_heads(modules)] if len(by_kind) == 1 else _targets(modules),
                "weights": codec(schemes[modules[0]]).arguments(schemes[modules[0]]),
                "input_activations": _inputs(schemes[modules[0]]),
                "output_activations": None,
                "format": kind[0],
            }
        formats = {kind[0] for kind in by_kind}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _short(ignored, schemes),
            "kv_cache_scheme": cache.arguments() if options.get("kv_cache") else None,
            "version": _VERSION,
        }

    def parse(self, quantization_config: Mapping[str, Any]) -> CompressedTensorsReader:
        given = quantization_config
        kv_cache = cache.parse(as_object(given.get("kv_cache_scheme"), "kv_cache_scheme"))
        sparsity = as_object(given.get("sparsity_config"), "sparsity_config")
        transform = as_object(given.get("transform_config"), "transform_config")
        if sparsity.get("format", "dense") != "dense" or transform.get("config_groups"):
            raise QkitError("compressed-tensors with sparsity or transforms is not supported")
        groups = as_object(given.get("config_groups"), "config_groups")
        if not groups and kv_cache is None:
            raise QkitError("the compressed-tensors config has no config_groups")
        targets: dict[str, LayerSpec] = {}
        for name, group in groups.items():
            group = as_object(group, name)
            scheme = _parse_group(name, group, group.get("format") or given.get("format"))
            targets.update(dict.fromkeys(as_names(group.get("targets"), f"{name}.targets"), scheme))
        ignore = as_names(given.get("ignore"), "ignore")
        for pattern in (*targets, *ignore):
            check_pattern(pattern.removeprefix("re:"))
        return CompressedTensorsReader(targets, ignore, self, kv_cache)


@dataclass(frozen=True)
class CompressedTensorsReader:
    """Which module has which scheme, by the rules of compressed_tensors/utils/match.py."""

    targets: Mapping[str, LayerSpec]
    ignore: tuple[str, ...]
    format: CompressedTensors = field(default_factory=CompressedTensors)
    kv_cache: str | None = None
    markers: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    scale: ClassVar[str] = "weight_scale"
    optional: ClassVar[tuple[str, ...]] = (*integers.OPTIONAL, *floats.OPTIONAL, *NVFP4.OPTIONAL)

    def scheme(self, module: str) -> LayerSpec | None:
        if any(_matches(module, pattern) for pattern in self.ignore):
            return None
        # Most specific first: exact names, then patterns, then the class.
        for target in sorted(self.targets, key=lambda t: (t.startswith("re:"), t)):
            if _matches(module, target):
                return self.targets[target]
        return self.targets.get("Linear")

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        found: tuple[str, ...] = codec(scheme).required(scheme)
        return found


def _inputs(spec: LayerSpec) -> dict[str, Any] | None:
    """`input_activations` of a config group."""
    if spec.input is None:
        return None
    strategy = {"token": "token", "group": "group", "tensor": "tensor"}[spec.input.per]
    return {
        "num_bits": spec.input.bits, "type": spec.input.kind, "symmetric": True, "strategy": strategy,
        "group_size": spec.scale.block[1] if strategy == "group" else None, "dynamic": spec.input.dynamic,
        "observer": None,
    }  # fmt: skip


_EXPERTS = "re:.*\\.experts\\..*"


def _heads(modules: list[str]) -> list[str]:
    """Names of heads, which to vLLM are no "Linear"."""
    return [module for module in modules if module.rpartition(".")[2] == "lm_head"]


def _targets(modules: list[str]) -> list[str]:
    """Names, but for experts, which transformers finds by a pattern that says so."""
    named = [module for module in modules if ".experts." not in module]
    return named if len(named) == len(modules) else [*named, _EXPERTS]


def _short(ignored: list[str], schemes: Mapping[str, LayerSpec]) -> list[str]:
    """`ignored`, with one pattern for a tower of which nothing is quantized."""
    patterns: list[str] = []
    for name in ignored:
        tower = TOWERS.search(name)
        if tower is None or any(f".{tower[1]}." in f".{module}" for module in schemes):
            patterns.append(name)
        elif (pattern := f"re:(.*\\.)?{tower[1]}\\..*") not in patterns:
            patterns.append(pattern)
    return patterns


def _parse_group(name: str, group: Mapping[str, Any], stored: Any) -> LayerSpec:
    found = next((each for each in CODECS.values() if stored == each.NAME), None)
    if found is None:
        known = ", ".join(each.NAME for each in CODECS.values())
        raise QkitError(f"compressed-tensors format {stored!r} is not supported", f"supported: {known}")
    weights = as_object(group.get("weights"), "weights")
    if not weights:
        raise QkitError(f"config group {name!r} does not quantize weights")
    if group.get("output_activations"):
        raise QkitError(f"config group {name!r} quantizes outputs", "supported: weights and inputs")
    spec: LayerSpec = found.parse(name, weights, as_object(group.get("input_activations"), "input_activations"))
    return spec


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return pattern_matches(pattern[3:], module)
    return module == pattern
