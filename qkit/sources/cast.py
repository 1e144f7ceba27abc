"""A checkpoint whose wider floats are read as its own float type: for formats whose clients compute with one type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import model_dtype
from ..spec.dtypes import TensorMeta, torch_dtype
from .types import Sidecar, Source, Stored

if TYPE_CHECKING:
    import torch


class CastSource:
    """`types.Source`: float32 tensors as the type that config.json declares."""

    def __init__(self, source: Source):
        self.source = source
        self.label, self.base_model, self.config = source.label, source.base_model, source.config
        self.stored: Stored = source.stored
        self.folder: Path | None = source.folder
        self._dtype = model_dtype(source.config)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def metadata(self) -> dict[str, Any]:
        return self.source.metadata

    @property
    def sidecars(self) -> tuple[Sidecar, ...]:
        return self.source.sidecars

    def names(self) -> list[str]:
        return self.source.names()

    def meta(self, name: str) -> TensorMeta:
        meta = self.source.meta(name)
        return replace(meta, dtype=self._dtype) if meta.dtype == "F32" else meta

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name).to(torch_dtype(self.meta(name).dtype))
