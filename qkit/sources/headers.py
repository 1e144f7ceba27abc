"""What is known of a checkpoint whose tensors are not there: its config, and their names, types and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..spec.dtypes import TensorMeta
from ..storage.files import natural_key
from ..storage.store import Store
from .types import Rows, Sidecar, Stored

if TYPE_CHECKING:
    import torch


class Headers:
    """`Source` without files. No tensors where there is a config alone."""

    def __init__(self, label: str, base_model: str, config: dict[str, Any], metas: Mapping[str, TensorMeta]):
        self.label, self.base_model, self.config = label, base_model, config
        self._metas = {name: metas[name] for name in sorted(metas, key=natural_key)}
        quantized = bool(config.get("quantization_config") or config.get("compression_config"))
        types = dict(Counter(m.dtype for m in self._metas.values()))
        self.stored = Stored(sum(m.nbytes for m in self._metas.values()), types, quantized)
        self.folder: Path | Store | None = None
        self.sidecars: tuple[Sidecar, ...] = ()
        self.metadata: dict[str, Any] = {}
        self.fingerprint = ""

    def names(self) -> list[str]:
        return list(self._metas)

    def meta(self, name: str) -> TensorMeta:
        return self._metas[name]

    def read(self, name: str) -> torch.Tensor:
        raise QkitError(f"{self.label} was looked at by its headers alone: {name!r} cannot be read")

    def read_part(self, name: str, index: int) -> torch.Tensor:
        return self.read(name)

    def rows(self, name: str) -> Rows | None:
        return None
