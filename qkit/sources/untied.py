"""A checkpoint whose output head is the embedding, as one that has a head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec.dtypes import TensorMeta
from .types import Sidecar, Source, Stored

if TYPE_CHECKING:
    import torch

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def is_tied(source: Source) -> bool:
    """Whether the head is not in the checkpoint, and the embedding is."""
    names = set(source.names())
    return HEAD not in names and EMBEDDING in names


class Untied:
    """`types.Source`: lm_head.weight is the embedding, and config.json says that they are two."""

    def __init__(self, source: Source):
        self.source = source
        self.label, self.base_model = source.label, source.base_model
        self.config: dict[str, Any] = {**source.config, "tie_word_embeddings": False}
        nested = source.config.get("text_config")
        if isinstance(nested, Mapping) and "tie_word_embeddings" in nested:
            self.config["text_config"] = {**nested, "tie_word_embeddings": False}
        self.stored: Stored = source.stored
        self.folder: Path | None = source.folder

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
        return [HEAD, *self.source.names()]

    def meta(self, name: str) -> TensorMeta:
        return self.source.meta(EMBEDDING if name == HEAD else name)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(EMBEDDING if name == HEAD else name)
