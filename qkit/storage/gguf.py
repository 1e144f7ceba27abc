"""Writing GGUF files (ggml/docs/gguf.md, version 3, little-endian); how the bytes get to their place is the store's."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..spec.ggml import GgmlType
from .store import FileDigest, Store

if TYPE_CHECKING:
    import torch

    from .writer import Pieces

ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its closing zero
# enum gguf_metadata_value_type
_FORMATS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}
_STRING, _ARRAY = 8, 9


class Typed(NamedTuple):
    """A number with its type: "u32", "i32", "f32", "bool"; or an array of such, or of strings ("str")."""

    kind: str
    value: Any


class Entry(NamedTuple):
    """A tensor to be written; shape in torch's order."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows * self.type.row_bytes(self.shape[-1])


def gguf_header(metadata: Mapping[str, str | Typed], entries: Sequence[Entry]) -> bytes:
    """Everything before the tensors' bytes, padded to the alignment.

    Raises ValueError for a name that is too long or appears twice."""
    names = [entry.name for entry in entries]
    for name in names:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"the tensor name {name!r} is longer than {MAX_NAME_BYTES} bytes")
    if len(set(names)) != len(names):
        raise ValueError("a tensor name appears twice")
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    offset = 0
    for entry in entries:
        out += _string(entry.name) + struct.pack("<I", len(entry.shape))
        out += struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
        out += struct.pack("<IQ", entry.type.number, offset)
        offset += _padded(entry.nbytes)
    return bytes(out) + b"\0" * (-len(out) % ALIGNMENT)


def write_gguf(
    store: Store,
    name: str,
    metadata: Mapping[str, str | Typed],
    entries: Sequence[Entry],
    tensors: Iterable[torch.Tensor | Pieces],
) -> FileDigest:
    """Write one file: the header, then `tensors`, taken one at a time in the order of `entries`, as blocks or values.

    Raises ValueError where their bytes do not match the entries, QkitError where the system refuses; nothing is left
    behind then."""
    return store.write(name, _chunks(gguf_header(metadata, entries), entries, tensors))


def _chunks(header: bytes, entries: Sequence[Entry], tensors: Iterable[torch.Tensor | Pieces]) -> Iterator[memoryview]:
    from .writer import written

    yield memoryview(header)
    position = 0
    for tensor in tensors:
        if position == len(entries):
            raise ValueError(f"more tensors than the {len(entries)} announced")
        entry = entries[position]
        actual, chunks = written(tensor)
        if actual.nbytes != entry.nbytes:
            raise ValueError(f"{entry.name}: announced {entry.nbytes} bytes, got {actual.nbytes}")
        yield from chunks
        del tensor, chunks  # before the next one is made
        yield memoryview(bytes(-entry.nbytes % ALIGNMENT))
        position += 1
    if position != len(entries):
        raise ValueError(f"{position} tensors where {len(entries)} were announced")


def _padded(n: int) -> int:
    return n + -n % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: str | Typed) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if not isinstance(value.value, list | tuple):
        number, layout = _FORMATS[value.kind]
        return struct.pack("<I", number) + struct.pack(layout, value.value)
    if value.kind == "str":
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value.value)) + b"".join(map(_string, value.value))
    number, layout = _FORMATS[value.kind]
    packed = struct.pack(f"<{len(value.value)}{layout[1]}", *value.value)
    return struct.pack("<IIQ", _ARRAY, number, len(value.value)) + packed
