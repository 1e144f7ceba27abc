"""What a checkpoint is to the rest of qkit: named tensors, a config, and files to carry along."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..spec.dtypes import TensorMeta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sidecar:
    """A file that travels with the weights byte for byte (tokenizer, chat template, ...).

    data is the bytes themselves (rebuilt from a GGUF) or the path to copy them from.
    """

    name: str
    data: bytes | Path

    @property
    def nbytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    def read(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()


# Of a model card's front matter, what stays true of a quantized copy.
CARD_KEYS = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class Stored:
    """Tensor data as it lies on disk. types: type name -> tensors of it; quantized: whether the source is itself so."""

    nbytes: int
    types: dict[str, int]
    quantized: bool

    def describe(self) -> str:
        """ "210 x Q4_1, 61 x F32"."""
        return ", ".join(f"{n} x {kind}" for kind, n in sorted(self.types.items(), key=lambda item: -item[1]))


class Source(Protocol):
    """A readable checkpoint. Opening one validates every header; no tensor is read until asked for.

    label        what the user named: a path, a Hub id, "demo"
    base_model   what the model card calls it: a Hub id where known, else what kind of model it is; never a name of
                 the user's folder
    config       config.json, parsed
    sidecars     files other than weights and config.json
    fingerprint  hex digest that changes when any header, sidecar or sampled content does; independent of where the
                 files lie; cheap (a few spots of every tensor)
    stored       what the tensors take on disk, which for a quantized source is not what `meta` says
    folder       where the files lie, to look for a manifest; None where there is no folder of the model's own
    metadata     what its model card or its file declares: license, language, ... (huggingface_hub's ModelCardData)
    """

    label: str
    base_model: str
    config: dict[str, Any]
    fingerprint: str
    stored: Stored
    folder: Path | None
    metadata: dict[str, Any]

    @property
    def sidecars(self) -> tuple[Sidecar, ...]:
        """Read-only, so that a source may build them on first use."""
        ...

    def names(self) -> list[str]:
        """Tensor names, sorted by (natural) order: layers.2 before layers.10."""
        ...

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape that `read` will return; KeyError for an unknown name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, contiguous, in memory of its own. Thread-safe. Raises QkitError if the file
        changed or cannot be read."""
        ...
