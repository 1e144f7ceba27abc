"""What a checkpoint is to the rest of qkit: named tensors, a config, and files to carry along."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from .. import units
from ..errors import QkitError
from ..spec.dtypes import TensorMeta
from ..storage.files import natural_key
from ..storage.store import Store, hash_file, read_file

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# (first, end) -> rows first .. end - 1, in memory of their own. Thread-safe. `first` is a multiple of `ROWS`, within
# which what is computed, not read, may depend on where it began.
Rows: TypeAlias = "Callable[[int, int], torch.Tensor]"
ROWS = 256


@dataclass(frozen=True)
class Sidecar:
    """A file that travels with the weights byte for byte (tokenizer, chat template, ...).

    data is the bytes themselves (rebuilt from a GGUF) or the store that has the file, under the same name.
    """

    name: str
    data: bytes | Store

    @property
    def nbytes(self) -> int:
        if isinstance(self.data, bytes):
            return len(self.data)
        reader = self.data.open(self.name)
        reader.close()
        return reader.nbytes

    def read(self) -> bytes:
        """Its bytes. Raises QkitError where they are no longer those of `sha256`, if that was asked for before."""
        data = self.data if isinstance(self.data, bytes) else read_file(self.data, self.name)
        if not isinstance(self.data, bytes) and hashlib.sha256(data).hexdigest() != self.sha256:
            hint = "leave the source alone while it is converted, and start again with --restart"
            raise QkitError(f"{self.data.label}/{self.name} is not what it was when the run began", hint)
        return data

    @cached_property
    def sha256(self) -> str:
        """Of its bytes, which are not held in memory; of what they were when it was first asked for."""
        if isinstance(self.data, bytes):
            return hashlib.sha256(self.data).hexdigest()
        return hash_file(self.data, self.name).sha256


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
        return units.counted(self.types)


class Source(Protocol):
    """A readable checkpoint. Opening one validates every header; no tensor is read until asked for.

    label        what the user named: a path, a Hub id, "demo"
    base_model   what the model card calls it: a Hub id where known, else what kind of model it is; never a name of
                 the user's folder
    config       config.json, parsed
    sidecars     files other than weights and config.json
    fingerprint  hex digest of the config, every tensor's name, type, shape and a few spots of its content, and every
                 sidecar whole; independent of where the files lie and how the tensors are spread over them
    stored       what the tensors take on disk, which for a quantized source is not what `meta` says
    folder       where the files lie, to look for a manifest: a path, or the store of files that lie elsewhere; None
                 where there is no folder of the model's own
    metadata     what its model card or its file declares: license, language, ... (huggingface_hub's ModelCardData)
    """

    label: str
    base_model: str
    config: dict[str, Any]
    stored: Stored
    folder: Path | Store | None

    # Read-only, so that a source may make them on first use.
    @property
    def fingerprint(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def sidecars(self) -> tuple[Sidecar, ...]: ...

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

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """`read(name)[index]`, in memory of its own, and without reading the rest where that can be helped."""
        ...

    def rows(self, name: str) -> Rows | None:
        """A reader of parts of `read(name)` along its first dimension; None where it can only be read whole."""
        ...


class Wrapped:
    """`Source` over another one, like it in all that a subclass does not say otherwise."""

    def __init__(self, source: Source):
        self.source = source
        self.label, self.base_model, self.config = source.label, source.base_model, source.config
        self.stored: Stored = source.stored
        self.folder: Path | Store | None = source.folder
        self._names: list[str] | None = None

    def _holds(self, names: Iterable[str]) -> None:
        """Its tensors, where they are others than the source's."""
        self._names = sorted(names, key=natural_key)

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
        return self.source.names() if self._names is None else list(self._names)

    def meta(self, name: str) -> TensorMeta:
        return self.source.meta(name)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name)

    def read_part(self, name: str, index: int) -> torch.Tensor:
        return self.read(name)[index].clone()

    def rows(self, name: str) -> Rows | None:
        """None: what `read` gives need not be what the source has."""
        return None


class Once(Generic[T]):
    """A value that is made when it is first asked for, by one of the threads that ask."""

    def __init__(self, make: Callable[[], T]):
        self._make, self._lock = make, Lock()
        self._found: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._found:
                self._found.append(self._make())
            return self._found[0]


def found_in(source: Source, kind: type[T]) -> T | None:
    """The source, or the one of `kind` that it looks at, through however many; None where there is none."""
    at: Any = source
    while not isinstance(at, kind):
        at = getattr(at, "source", None)
        if at is None:
            return None
    return at
