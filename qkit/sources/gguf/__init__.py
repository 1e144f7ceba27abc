"""GGUF files as transformers checkpoints."""

from __future__ import annotations

from pathlib import Path

from ...storage.store import Reader, Store
from .file import GgufFile
from .model import GgufSource

__all__ = ["GgufFile", "GgufSource", "open_gguf"]


def open_gguf(
    file: str | Path | Reader,
    base_model: str | None = None,
    dtype: str | None = None,
    label: str | None = None,
    store: Store | None = None,
) -> GgufSource:
    """Open a .gguf file (for a split one: its first part) as a transformers checkpoint.

    base_model  what the model card calls it; default: what the file says
    label       what messages call it; default: the path
    store       where the parts of a split one are; default: the folder of the path
    dtype       "BF16", "F16" or "F32": the type of every tensor read; None: see `GgufSource`

    Raises QkitError for a damaged file, an architecture, tokenizer or tensor type that is not supported, and
    tensors that are missing or have the wrong shape; no tensor of the model is read.
    """
    return GgufSource(GgufFile(file, store), base_model, dtype, label)
