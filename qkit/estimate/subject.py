"""A model as it would be held: what every estimate speaks of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import formats
from ..errors import QkitError
from ..models.architecture import Architecture, architecture
from ..models.config import model_dtype
from ..spec import LayerSpec, ggml, preset
from .declared import of_config
from .parts import Weights
from .weights import of_architecture, of_source

if TYPE_CHECKING:
    from ..sources.types import Source


@dataclass(frozen=True)
class Subject:
    """One model in one format.

    stored    how its weights lie there, in words: "as stored: safetensors, BF16", "as gguf q4_k_m"
    container "safetensors" or "gguf"
    spec      of most of the quantized weights; None: nothing is quantized
    basis     what the bytes of its weights come from
    config    config.json, parsed
    """

    label: str
    base_model: str
    arch: Architecture
    weights: Weights
    stored: str
    container: str
    spec: LayerSpec | None
    dtype: str
    basis: str
    config: Mapping[str, Any]

    @property
    def bits_per_weight(self) -> float:
        """Bits of all bytes for each parameter, as a file's size is given."""
        return 8 * self.weights.total / max(1, self.arch.parameters)


def subject(model: str, format: str | None = None, scheme: str | None = None) -> Subject:
    """A checkpoint, by its headers, or by its config where there are no weights; as it is, or as `qkit convert` would
    write it in a format and scheme.

    Raises QkitError for what is no checkpoint, a config that lacks what it takes, a scheme that does not fit."""
    from ..sources.described import describe_source

    return of_described(describe_source(model), format, scheme)


def of_described(source: Source, format: str | None = None, scheme: str | None = None) -> Subject:
    """The same of a checkpoint that is open."""
    arch = architecture(source.config)
    dtype = model_dtype(source.config)
    common: dict[str, Any] = {
        "label": source.label, "base_model": source.base_model, "arch": arch, "config": source.config,
    }  # fmt: skip
    if format is not None or scheme is not None:
        return _converted(common, arch, format or "compressed-tensors", scheme, dtype)
    if not source.names():
        weights, spec = of_config(arch, source.config)
        stored = f"as its config says: {spec.describe() if spec else dtype}"
        basis = "config.json alone: shapes of the architecture at the types that it declares"
        return Subject(
            **common, weights=weights, stored=stored, container="safetensors", spec=spec, dtype=dtype, basis=basis
        )
    weights, spec = of_source(source), main_spec(source)
    gguf = getattr(source, "tensors", None) is not None
    stored = f"as stored: {'gguf' if gguf else 'safetensors'}, {spec.describe() if spec else dtype}"
    return Subject(
        **common, weights=weights, stored=stored, container="gguf" if gguf else "safetensors", spec=spec, dtype=dtype,
        basis="headers: every tensor's bytes",
    )  # fmt: skip


def _converted(common: Mapping[str, Any], arch: Architecture, format: str, scheme: str | None, dtype: str) -> Subject:
    fmt = formats.get(format)
    name = scheme or fmt.default_scheme
    weights = of_architecture(arch, name, fmt, dtype)
    spec = preset(name)
    if spec is not None and spec.kind == "ggml" and spec.grid.block.islower():
        from ..formats.gguf.mixes import MIXES

        spec = ggml(MIXES[spec.grid.block][0])
    return Subject(
        **common, weights=weights, stored=f"as {fmt.name} {name}", container=fmt.container, spec=spec, dtype=dtype,
        basis="shapes of the architecture, as qkit convert stores them",
    )  # fmt: skip


def main_spec(source: Source) -> LayerSpec | None:
    """How most of a checkpoint's quantized weights are stored; None where none are."""
    tensors = getattr(source, "tensors", None)
    if tensors is not None:
        nbytes: Counter[str] = Counter()
        for info in tensors.values():
            if info.type.plain is None:
                nbytes[info.type.name] += info.nbytes
        return ggml(nbytes.most_common(1)[0][0]) if nbytes else None
    reader = formats.reader(source.config)
    if reader is None:
        return None
    try:
        specs = Counter(formats.quantized_modules(reader, source).values())
    except QkitError:  # what a conversion would refuse can still be weighed
        return None
    return specs.most_common(1)[0][0] if specs else None
