"""A quantized checkpoint as a source: every weight under its usual name, as values or as the codes that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.config import model_dtype
from ..sources.types import Once, Rows, Source, Wrapped
from ..spec import LayerSpec
from ..spec.dtypes import TensorMeta, torch_dtype
from . import kv_cache, local_names, quantized_modules, read_weight, reader

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight


class Expanded(Wrapped):
    """`types.Source` over one that is quantized in a format that qkit reads; weights are read in the model's type.

    schemes: name of each quantized weight -> how it is stored; kv_cache: what clients round keys and values to, whose
    scales are tensors as they are. Raises QkitError for a method that is not read."""

    def __init__(self, source: Source):
        found = reader(source.config)
        if found is None:
            raise QkitError(f"{source.label} is not quantized")
        super().__init__(source)
        self._reader = found
        self.config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
        self.kv_cache = kv_cache(found)
        self._dtype = model_dtype(source.config)
        self._modules = quantized_modules(found, source)
        self.schemes: Mapping[str, LayerSpec] = {f"{module}.weight": s for module, s in self._modules.items()}
        inside: set[str] = set()
        self._shapes: dict[str, tuple[int, int]] = {}
        for module, scheme in self._modules.items():
            inside |= {f"{module}.{local}" for local in local_names(found, source, module, scheme)}
            self._shapes[f"{module}.weight"] = found.format.shape(source, module, scheme)
        self._holds([*(n for n in source.names() if n not in inside), *self._shapes])

    def meta(self, name: str) -> TensorMeta:
        shape = self._shapes.get(name)
        return self.source.meta(name) if shape is None else TensorMeta(self._dtype, shape)

    def read(self, name: str) -> torch.Tensor:
        from ..kernels.codes import values_of

        if name not in self._shapes:
            return self.source.read(name)
        return values_of(self.weight(name), torch_dtype(self._dtype))

    def rows(self, name: str) -> Rows | None:
        """Of a quantized weight: it is held, as it is stored, from the first rows on for as long as its reader."""
        from ..kernels.codes import values_of

        if name not in self._shapes:
            return self.source.rows(name)
        held = Once(lambda: self.weight(name).plain())
        return lambda start, stop: values_of(held().rows(start, stop), torch_dtype(self._dtype))

    def weight(self, name: str) -> Weight:
        """The quantized weight as it is stored. Raises QkitError naming it and what is wrong with it."""
        module = name.removesuffix(".weight")
        return read_weight(self._reader, self.source, module, self._modules[module])


def same_grid(stored: LayerSpec, wanted: LayerSpec) -> bool:
    """Whether codes of one are codes of the other: of one kind and as many bits, in the same groups or blocks, with or
    without zero points both, with scales of scales alike."""
    a, b = stored, wanted
    return (
        (a.kind, a.bits, a.symmetric, a.scale.block) == (b.kind, b.bits, b.symmetric, b.scale.block)
        and a.scale.over == b.scale.over
        and b.grid.low in (None, a.grid.low)
    )


def repacked(weight: Weight, wanted: LayerSpec) -> Weight | None:
    """The weight with its scales in the type of `wanted`; None where the format cannot have its codes.

    Raises QkitError for zero points that the format has no form for."""
    if weight.order is not None:
        return None
    if wanted.min_zero and weight.zero is not None and int(weight.zero.min()) < wanted.min_zero:
        raise QkitError("it has a zero point of 0, which GPTQ v1 has no form for", "use --format gptq_v2")
    if wanted.kind not in ("int", "fp8"):  # their scales have one type
        return weight
    return replace(weight, scale=weight.scale.to(torch_dtype(wanted.scale_dtype)))
