"""Writing safetensors files; how the bytes get to their place is the store's business."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..spec.dtypes import TensorMeta, dtype_name
from .store import FileDigest, Store

if TYPE_CHECKING:
    import torch

_DEFAULT_METADATA = {"format": "pt"}  # transformers refuses files without it


def write_file(store: Store, name: str, data: bytes) -> FileDigest:
    """Write a file whole or not at all. Raises QkitError where the system refuses."""
    return store.write(name, [memoryview(data)])


def safetensors_header(entries: Sequence[tuple[str, TensorMeta]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of a file that holds `entries` in this order, padded with spaces to 8 bytes.

    metadata: the header's string table; default {"format": "pt"}.

    Raises ValueError for a name that appears twice or is reserved.
    """
    metadata = _DEFAULT_METADATA if metadata is None else metadata
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, meta in entries:
        if name in table or name == "__metadata__":
            raise ValueError(f"the tensor name {name!r} is reserved or appears twice")
        end = offset + meta.nbytes
        table[name] = {"dtype": meta.dtype, "shape": list(meta.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def file_bytes(entries: Sequence[tuple[str, TensorMeta]], metadata: Mapping[str, str] | None = None) -> int:
    """Exact size in bytes of the file `write_safetensors` would write."""
    return len(safetensors_header(entries, metadata)) + sum(meta.nbytes for _, meta in entries)


@dataclass(frozen=True)
class Pieces:
    """A tensor that comes in pieces along its first dimension. meta: of all of it."""

    meta: TensorMeta
    tensors: Iterator[torch.Tensor]


def written(tensor: torch.Tensor | Pieces) -> tuple[TensorMeta, Iterator[memoryview]]:
    """(what it is, its bytes in order). Raises ValueError, as the bytes are asked for, where pieces do not make up what
    they should."""
    if isinstance(tensor, Pieces):
        return tensor.meta, _piecewise(tensor)
    return TensorMeta(dtype_name(tensor.dtype), tuple(tensor.shape)), iter([tensor_bytes(tensor)])


def _piecewise(pieces: Pieces) -> Iterator[memoryview]:
    rows = 0
    for piece in pieces.tensors:
        actual = TensorMeta(dtype_name(piece.dtype), (pieces.meta.shape[0], *piece.shape[1:]))
        if actual != pieces.meta:
            raise ValueError(f"announced {pieces.meta}, got a piece of {actual}")
        rows += piece.shape[0]
        yield tensor_bytes(piece)
        del piece  # before the next one is made
    if rows != pieces.meta.shape[0]:
        raise ValueError(f"{rows} rows where {pieces.meta.shape[0]} were announced")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major; shares memory with a contiguous CPU tensor."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_safetensors(
    store: Store,
    name: str,
    entries: Sequence[tuple[str, TensorMeta]],
    tensors: Iterable[torch.Tensor | Pieces],
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write one safetensors file: the header from `entries`, then `tensors`, taken one at a time in that order.

    A tensor may be reused once the next one is asked for. metadata: the header's string table (default
    {"format": "pt"}, which transformers requires).

    Raises ValueError where the tensors do not match the entries (dtype, shape, number), QkitError if the
    system refuses. Whatever `tensors` raises passes through. In every case nothing is left behind.
    """
    return store.write(name, _chunks(entries, tensors, safetensors_header(entries, metadata)))


def _chunks(
    entries: Sequence[tuple[str, TensorMeta]], tensors: Iterable[torch.Tensor | Pieces], header: bytes
) -> Iterator[memoryview]:
    yield memoryview(header)
    position = 0
    for tensor in tensors:
        if position == len(entries):
            raise ValueError(f"more tensors than the {len(entries)} announced")
        name, meta = entries[position]
        actual, chunks = written(tensor)
        if actual != meta:
            raise ValueError(f"{name}: announced {meta}, got {actual}")
        yield from chunks
        del tensor, chunks  # before the next one is made
        position += 1
    if position != len(entries):
        raise ValueError(f"{position} tensors where {len(entries)} were announced")
