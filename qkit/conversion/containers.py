"""The files that hold a result's tensors: safetensors with an index and a config, or one GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..spec.dtypes import TensorMeta
from ..spec.ggml import GGML
from ..storage.store import FileDigest, Store
from .tasks import Shard, Task, make_shards

if TYPE_CHECKING:
    import torch

    from ..formats.gguf import Gguf
    from ..sources.types import Sidecar, Source
    from ..storage.writer import Pieces
    from .plan import Plan

INDEX = "model.safetensors.index.json"
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


class Tensors(Protocol):
    """What was written, by the names of the outputs, as bytes of the types that the plan says."""

    def meta(self, name: str) -> TensorMeta: ...

    def read(self, name: str) -> torch.Tensor: ...

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        """Of the first dimension of `read(name)`."""
        ...


class Container(Protocol):
    def shards(self, tasks: Sequence[Task], by_block: bool, name: str, limit: int) -> tuple[Shard, ...]:
        """The files, whose names and sizes are fixed before anything is written. name: what the result is called;
        limit: bytes of one file, where there may be several."""
        ...

    def write(self, plan: Plan, store: Store, shard: Shard, tensors: Iterable[torch.Tensor | Pieces]) -> FileDigest:
        """Write one of the files. tensors: the outputs of its tasks, in order."""
        ...

    def open(self, store: Store, shards: Sequence[Shard]) -> Tensors:
        """Raises QkitError where a file does not hold what it should."""
        ...

    def companions(self, plan: Plan, source: Source, calibration: dict[str, Any] | None) -> dict[str, bytes]:
        """Files that are made beside the weights, but for the card."""
        ...

    def sidecars(self, source: Source) -> tuple[Sidecar, ...]:
        """Files of the source that travel along."""
        ...


class Safetensors:
    """A folder as `save_pretrained` lays it out."""

    def shards(self, tasks: Sequence[Task], by_block: bool, name: str, limit: int) -> tuple[Shard, ...]:
        return make_shards(tasks, limit, by_block)

    def write(self, plan: Plan, store: Store, shard: Shard, tensors: Iterable[torch.Tensor | Pieces]) -> FileDigest:
        from ..storage.writer import write_safetensors

        return write_safetensors(store, shard.file, [output for t in shard.tasks for output in t.outputs], tensors)

    def open(self, store: Store, shards: Sequence[Shard]) -> Tensors:
        from ..sources.folder import FolderSource

        return _Folder(FolderSource(store))

    def companions(self, plan: Plan, source: Source, calibration: dict[str, Any] | None) -> dict[str, bytes]:
        config = dict(source.config)
        files: dict[str, bytes] = {}
        if plan.kinds:
            config["quantization_config"] = plan.quantization_config(calibration)
            files.update(plan.fmt.extra_files(config["quantization_config"]))
        return {**files, "config.json": _json(config), INDEX: _json(index(plan))}

    def sidecars(self, source: Source) -> tuple[Sidecar, ...]:
        return source.sidecars


def index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in plan.shards for t in shard.tasks for name, _ in t.outputs}
    return {"metadata": {"total_size": plan.bytes_out}, "weight_map": dict(sorted(weight_map.items()))}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class OneGguf:
    """Everything in one file, in llama.cpp's order: what the model needs first comes first."""

    def shards(self, tasks: Sequence[Task], by_block: bool, name: str, limit: int) -> tuple[Shard, ...]:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
        return (Shard(f"{plain}.gguf", tuple(tasks)),)

    def write(self, plan: Plan, store: Store, shard: Shard, tensors: Iterable[torch.Tensor | Pieces]) -> FileDigest:
        from ..storage.gguf import Entry, write_gguf

        fmt: Gguf = plan.fmt  # type: ignore[assignment]  # the only one with this container
        entries = []
        for task in shard.tasks:
            for name, meta in task.outputs:
                block = task.scheme.grid.block if task.scheme else meta.dtype
                inputs = task.meta.shape[-1] if task.scheme else meta.shape[-1]
                entries.append(Entry(name, GGML[block], (*meta.shape[:-1], inputs)))
        return write_gguf(
            store, shard.file, fmt.header(plan.name, plan.options.scheme if plan.kinds else None), entries, tensors
        )

    def open(self, store: Store, shards: Sequence[Shard]) -> Tensors:
        from ..sources.gguf import GgufFile

        return _Blocks(GgufFile(store.open(shards[0].file), store))

    def companions(self, plan: Plan, source: Source, calibration: dict[str, Any] | None) -> dict[str, bytes]:
        return {}

    def sidecars(self, source: Source) -> tuple[Sidecar, ...]:
        """The tokenizer is in the file; of the rest only what must not be left behind."""
        return tuple(s for s in source.sidecars if s.name.upper().startswith(_LICENCES))


class _Folder:
    def __init__(self, source: Source):
        self.meta, self.read, self._rows = source.meta, source.read, source.rows

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        read = self._rows(name)
        return self.read(name)[first:last] if read is None else read(first, last)


class _Blocks:
    def __init__(self, file: Any):
        self.file = file

    def meta(self, name: str) -> TensorMeta:
        info = self.file.tensors[name]
        if info.type.plain:
            return TensorMeta(info.type.plain, info.shape)
        return TensorMeta("U8", (*info.shape[:-1], info.type.row_bytes(info.shape[-1])))

    def read(self, name: str) -> torch.Tensor:
        return self.part(name, 0, self.meta(name).shape[0])

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        found: torch.Tensor = self.file.raw(name, first, last)
        return found.view(last - first, *self.meta(name).shape[1:]) if found.element_size() == 1 else found


CONTAINERS: dict[str, Container] = {"safetensors": Safetensors(), "gguf": OneGguf()}
