"""A checkpoint with one matrix per expert, over one that has the experts of a layer in one tensor; and back again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ..models.fused import Fused, Part, canonical, find_fused
from ..spec.dtypes import TensorMeta, torch_dtype
from .types import Rows, Source, Wrapped

if TYPE_CHECKING:
    import torch


class Sliced(Wrapped):
    """`types.Source`. A part is read without the rest of its tensor.

    fused: the tensors that are sliced, by name"""

    def __init__(self, source: Source, fused: Iterable[Fused]):
        super().__init__(source)
        self.fused: Mapping[str, Fused] = {each.name: each for each in fused}
        self._parts: dict[str, tuple[Fused, Part]] = {
            part.name: (each, part) for each in self.fused.values() for part in each.parts()
        }
        layout = next(iter(self.fused.values())).layout
        self._stored = {canonical(name, layout): name for name in source.names() if name not in self.fused}
        self._holds([*self._stored, *self._parts])

    def meta(self, name: str) -> TensorMeta:
        if name not in self._parts:
            return self.source.meta(self._stored[name])
        fused, _ = self._parts[name]
        return TensorMeta(fused.meta.dtype, fused.shape)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return self.source.read(self._stored[name])
        fused, part = self._parts[name]
        expert = self.source.read_part(fused.name, part.expert)
        return (expert.t() if fused.transposed else expert)[fused.of(part.half)].contiguous()

    def rows(self, name: str) -> Rows | None:
        return None if name in self._parts else self.source.rows(self._stored[name])


class Joined(Wrapped):
    """`types.Source` over one that has the names of a `Sliced` one: the experts below `stems` are in one tensor again,
    named and laid out as transformers has them at 16 bits.

    joined: these tensors, by that name"""

    def __init__(self, source: Source, sliced: Sliced, stems: Collection[str]):
        super().__init__(source)
        self._plain = sliced.source
        self.joined: dict[str, Fused] = {}
        inside: set[str] = set()
        for each in sliced.fused.values():
            if each.stem not in stems:
                continue
            inside |= {_value(part.name) for part in each.parts()}
            if each.local != "scales":
                self.joined[each.name.removesuffix("_blocks")] = each
        self._holds([*(name for name in source.names() if name not in inside), *self.joined])

    def meta(self, name: str) -> TensorMeta:
        if name not in self.joined:
            return self.source.meta(name)
        fused = self.joined[name]
        part = self.source.meta(_value(next(fused.parts()).name))
        shape = (fused.rows, *part.shape[1:])
        return TensorMeta(part.dtype, (fused.meta.shape[0], *(shape[::-1] if _transposed(fused) else shape)))

    def read(self, name: str) -> torch.Tensor:
        import torch

        if name not in self.joined:
            return self.source.read(name)
        fused = self.joined[name]
        if name == fused.name:
            return self._plain.read(name)
        meta = self.meta(name)
        whole = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
        for part in fused.parts():
            expert = whole[part.expert].t() if _transposed(fused) else whole[part.expert]
            expert[fused.of(part.half)] = self.source.read(_value(part.name))
        return whole

    def rows(self, name: str) -> Rows | None:
        return None if name in self.joined else self.source.rows(name)


def _value(part: str) -> str:
    """What a part is called once blocks and scales are dequantized."""
    return part.removesuffix("blocks") + "weight" if part.endswith(".blocks") else part


def _transposed(fused: Fused) -> bool:
    """Blocks lie along the inputs; values as the family has them."""
    return fused.layout.transposed if fused.local == "blocks" else fused.transposed


def sliced(source: Source, whole: bool = False) -> Sliced | None:
    """The source with one matrix per expert; None where none of its tensors holds several. whole: an expert's gate and
    up are one matrix."""
    fused = find_fused({name: source.meta(name) for name in source.names()}, source.config, whole)
    return Sliced(source, fused) if fused else None
