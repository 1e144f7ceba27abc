"""A checkpoint whose wider floats are read as its own float type: for formats whose clients compute with one type."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..models.config import model_dtype
from ..spec.dtypes import TensorMeta, torch_dtype
from .types import Rows, Source, Wrapped

if TYPE_CHECKING:
    import torch


class CastSource(Wrapped):
    """`types.Source`: float32 tensors as the type that config.json declares."""

    def __init__(self, source: Source):
        super().__init__(source)
        self._dtype = model_dtype(source.config)

    def meta(self, name: str) -> TensorMeta:
        meta = self.source.meta(name)
        return replace(meta, dtype=self._dtype) if meta.dtype == "F32" else meta

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name).to(torch_dtype(self.meta(name).dtype))

    def rows(self, name: str) -> Rows | None:
        found, dtype = self.source.rows(name), torch_dtype(self.meta(name).dtype)
        return None if found is None else lambda start, stop: found(start, stop).to(dtype)
