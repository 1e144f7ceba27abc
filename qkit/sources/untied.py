"""A checkpoint whose output head is the embedding, as one that has a head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..spec.dtypes import TensorMeta
from .types import Rows, Source, Wrapped

if TYPE_CHECKING:
    import torch

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def is_tied(source: Source) -> bool:
    """Whether the head is not in the checkpoint, and the embedding is."""
    names = set(source.names())
    return HEAD not in names and EMBEDDING in names


class Untied(Wrapped):
    """`types.Source`: lm_head.weight is the embedding, and config.json says that they are two."""

    def __init__(self, source: Source):
        super().__init__(source)
        self.config = {**source.config, "tie_word_embeddings": False}
        nested = source.config.get("text_config")
        if isinstance(nested, Mapping) and "tie_word_embeddings" in nested:
            self.config["text_config"] = {**nested, "tie_word_embeddings": False}

    def names(self) -> list[str]:
        return [HEAD, *self.source.names()]

    def meta(self, name: str) -> TensorMeta:
        return self.source.meta(EMBEDDING if name == HEAD else name)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(EMBEDDING if name == HEAD else name)

    def rows(self, name: str) -> Rows | None:
        return self.source.rows(EMBEDDING if name == HEAD else name)
