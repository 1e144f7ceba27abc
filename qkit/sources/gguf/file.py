"""GGUF files: a strict header parser, and tensors dequantized as they are read.

Format: ggml/docs/gguf.md, versions 2 and 3, little-endian, one file or split (`-00001-of-0000N.gguf`). Only the
header is read on opening. What the tensors mean to a model is in model.py.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import QkitError
from ...spec.ggml import GGML_TYPES, GgmlType
from ...storage.local import at, open_file
from ...storage.samples import sample
from ...storage.store import Reader, Store, read_bytes

if TYPE_CHECKING:
    import torch


# No real header comes near these; they bound what a damaged one can make us allocate or loop over.
MAX_HEADER_BYTES = 1 << 27  # a vocabulary of 262k tokens takes a tenth
MAX_PAIRS, MAX_TENSORS = 1 << 16, 1 << 18
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY = 1 << 24
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4  # GGML_MAX_DIMS
_FIRST_READ, _READ = 1 << 16, 1 << 20
_DATA_READ = 8 << 20  # bytes of blocks in memory at a time
_BROKEN = "the file is damaged or was not downloaded completely: fetch it again"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# enum gguf_metadata_value_type
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class StringArray:
    """An array of strings, decoded when iterated: a vocabulary has hundreds of thousands."""

    def __init__(self, raw: bytes, count: int):
        self._raw, self._count = raw, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Raises UnicodeDecodeError (a ValueError) where a string is not UTF-8."""
        raw, at, length_at = self._raw, 0, struct.Struct("<Q").unpack_from
        for _ in range(self._count):
            start = at + 8
            at = start + length_at(raw, at)[0]
            yield raw[start:at].decode("utf-8")


class TensorInfo(NamedTuple):
    """A tensor in the file: shape in torch's order, offset in bytes from the start of part number `part`."""

    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


class _Cursor:
    """Reads the header front to back; every length is checked against the file before it is used."""

    def __init__(self, file: Reader):
        self.file, self.size = file, file.nbytes
        self.buffer = bytearray()
        self.at = 0

    def need(self, count: int, what: str) -> None:
        """Make `count` bytes from `at` on available; ValueError where the file ends before."""
        end = self.at + count
        if end <= len(self.buffer):
            return
        if end > self.size:
            raise ValueError(f"it ends at byte {self.size}, inside {what}, which reaches to byte {end}")
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"its header is over {MAX_HEADER_BYTES} bytes, inside {what}")
        while len(self.buffer) < end:
            want = max(end - len(self.buffer), _READ if self.buffer else _FIRST_READ)
            start = len(self.buffer)
            self.buffer += read_bytes(self.file, start, min(want, self.size - start))

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + layout)
        self.need(size, what)
        values = struct.unpack_from("<" + layout, self.buffer, self.at)
        self.at += size
        return values

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        (length,) = self.unpack("Q", what)
        if length > limit:
            raise ValueError(f"{what} claims a string of {length} bytes (limit {limit})")
        self.need(length, what)
        raw = bytes(self.buffer[self.at : self.at + length])
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind], what)[0]
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown value type {kind}")
        kind, count = self.unpack("IQ", what)
        if count > MAX_ARRAY:
            raise ValueError(f"{what} claims an array of {count} elements (limit {MAX_ARRAY})")
        if kind in _SCALARS:
            return self.unpack(f"{count}{_SCALARS[kind]}", what)
        if kind == _STRING:
            return self._strings(count, what)
        raise ValueError(f"{what} is an array of the unsupported value type {kind}")

    def _strings(self, count: int, what: str) -> StringArray:
        start, length_at = self.at, struct.Struct("<Q").unpack_from
        self.need(8 * count, what)
        at, ready = start, len(self.buffer) - 8
        for _ in range(count):
            if at > ready:
                self.at = at
                self.need(8, what)
                ready = len(self.buffer) - 8
            at += 8 + length_at(self.buffer, at)[0]
        self.at = start
        self.need(at - start, what)  # the last string's own bytes; a bogus length fails here or above
        self.at = at
        return StringArray(bytes(self.buffer[start:at]), count)


class _Part:
    """One file: the whole model, or a part of a split one."""

    def __init__(self, file: Reader):
        self.file, self.path = file, file.label
        try:
            self.metadata, self.tensors = self._parse(file.nbytes)
        except ValueError as error:
            self.close()
            raise QkitError(f"{self.path} is not a valid GGUF file: {error}", _BROKEN) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def _parse(self, size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        cursor = _Cursor(self.file)
        self._check_version(cursor)
        tensor_count, pair_count = cursor.unpack("QQ", "the counts")
        # The least a pair and a tensor can take; a bogus count is refused before anything is looped over.
        if pair_count > MAX_PAIRS or tensor_count > MAX_TENSORS or pair_count * 13 + tensor_count * 33 > size:
            raise ValueError(f"it claims {pair_count} metadata pairs and {tensor_count} tensors in {size} bytes")
        metadata: dict[str, Any] = {}
        for i in range(pair_count):
            key = cursor.string(f"the key of metadata pair {i}", MAX_STRING_BYTES)
            if key in metadata:
                raise ValueError(f"the metadata key {key!r} appears twice")
            (kind,) = cursor.unpack("I", f"metadata {key!r}")
            metadata[key] = cursor.value(kind, f"metadata {key!r}")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {str(alignment)[:50]}, not a power of two")
        found = [_tensor_info(cursor, i) for i in range(tensor_count)]
        self.header_digest = hashlib.sha256(memoryview(cursor.buffer)[: cursor.at]).digest()
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, info in found:
            if name in tensors:
                raise ValueError(f"the tensor name {name!r} appears twice")
            if info.offset % alignment:
                raise ValueError(f"tensor {name!r} at offset {info.offset} is not aligned to {alignment} bytes")
            end = start + info.offset + info.nbytes
            if end > size:
                raise ValueError(f"it ends at byte {size}, inside tensor {name!r}, which reaches to byte {end}")
            tensors[name] = info._replace(offset=start + info.offset)
        reached = 0
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            if info.offset < reached:
                raise ValueError(f"tensor {name!r} overlaps the tensor before it")
            reached = info.offset + info.nbytes
        return metadata, tensors

    def _check_version(self, cursor: _Cursor) -> None:
        if read_bytes(self.file, 0, min(8, self.file.nbytes)) == b"version ":
            raise QkitError(f"{self.path} is a Git LFS pointer, not the file itself", "run: git lfs pull")
        magic, version = cursor.unpack("4sI", "the magic number and the version")
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not with b'GGUF'")
        if version in (2, 3):
            return
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (1, 2, 3):
            raise QkitError(f"{self.path} is a big-endian GGUF file", "use the little-endian file of the same model")
        remedy = "convert the model again with a current llama.cpp" if version < 2 else "update qkit"
        raise QkitError(f"{self.path} is GGUF version {version}; qkit reads versions 2 and 3", remedy)


def _tensor_info(cursor: _Cursor, index: int) -> tuple[str, TensorInfo]:
    """Name and place of the next tensor, its offset still relative to the data. Raises ValueError."""
    name = cursor.string(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    (dims,) = cursor.unpack("I", what)
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"{what} claims {dims} dimensions (1 to {MAX_DIMS} are possible)")
    shape = cursor.unpack(f"{dims}Q", what)[::-1]
    number, offset = cursor.unpack("IQ", what)
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise ValueError(f"{what} has the unknown ggml type {number}")
    count = 1
    for size in shape:
        count *= size
        if not 0 < count < 1 << 48:
            raise ValueError(f"{what} has the impossible shape {list(shape)}")
    if shape[-1] % kind.block_size:
        raise ValueError(f"{what}: rows of {shape[-1]} are no multiple of the {kind.block_size} of {kind.name}")
    return name, TensorInfo(kind, shape, offset, count // kind.block_size * kind.block_bytes)


class GgufFile:
    """An open GGUF file, all its parts. `read` is thread-safe.

    metadata  key -> int, float, bool, str, tuple of numbers or StringArray
    tensors   name -> TensorInfo
    """

    def __init__(self, file: str | Path | Reader, store: Store | None = None):
        """store: where further parts of a split model are; by default the folder that `file` is the path of."""
        first = open_file(file)
        self.store = store or at(Path(first.label).parent)
        self.path, self.name = first.label, first.name
        self._parts = [_Part(first)]
        self.metadata = self._parts[0].metadata
        count = self.metadata.get("split.count", 0)
        if type(count) is int and count > 1:
            self._open_parts(count)
        self.tensors: dict[str, TensorInfo] = {}
        for number, part in enumerate(self._parts):
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise QkitError(f"{part.path}: tensor {name!r} is in another part too", _BROKEN)
                self.tensors[name] = info._replace(part=number)

    def _open_parts(self, count: int) -> None:
        match = _SPLIT.fullmatch(self.name)
        number = self.metadata.get("split.no", 0)
        if match is None or int(match[3]) != count:
            raise QkitError(
                f"{self.path} says it is part {number} of {count}, its name does not",
                f"restore the original names (NAME-00001-of-{count:05}.gguf)",
            )
        if number != 0:
            first = f"{match[1]}-00001-of-{match[3]}.gguf"
            raise QkitError(f"{self.path} is not the first part of the model", f"name the first part: {first}")
        for i in range(1, count):
            part = _Part(self.store.open(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf"))
            if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
                raise QkitError(f"{part.path} is not part {i + 1} of {count}", _BROKEN)
            self._parts.append(part)

    def close(self) -> None:
        """Close the file; harmless when already closed. Happens by itself when the object goes away."""
        for part in self._parts:
            part.close()

    def fingerprint(self) -> str:
        """Hex digest over every part's header, size and a few spots of every tensor: it tells two fine-tunes of one
        model apart, whichever tensors differ, without reading them."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(part.header_digest + part.file.nbytes.to_bytes(8, "little"))
            for info in part.tensors.values():
                digest.update(sample(part.file, info.offset, info.nbytes))
        return digest.hexdigest()

    def raw(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor as it is stored: of its own type, or uint8 [bytes] of blocks. first, last: only those of its first
        dimension. Raises as `read` does."""
        import torch

        from ...spec.dtypes import torch_dtype

        info = self.tensors[name]
        last = info.shape[0] if last is None else last
        row = info.nbytes // max(1, info.shape[0])
        raw = torch.empty((last - first) * row, dtype=torch.uint8)
        self._parts[info.part].file.read_into(raw.numpy().data, info.offset + first * row)
        shape = (last - first, *info.shape[1:])
        return raw.view(torch_dtype(info.type.plain)).view(shape) if info.type.plain else raw

    def read(
        self, name: str, dtype: torch.dtype, index: int | None = None, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The tensor as `dtype`, contiguous, in memory of its own; `index`: only that slice of the first dimension;
        `rows`: of what is left only rows first .. end - 1. Raises KeyError for an unknown name, QkitError if the file
        changed or cannot be read.

        Memory beside the result: one piece of the file of 8 MiB and its float32 values.
        """
        import torch

        from ...kernels.ggml import dequantize
        from ...spec.dtypes import torch_dtype

        info = self.tensors[name]
        part = self._parts[info.part]
        shape, offset, nbytes = info.shape, info.offset, info.nbytes
        if index is not None:
            nbytes //= shape[0]
            shape, offset = shape[1:], offset + index * nbytes
        if rows is not None:
            row = nbytes // shape[0]
            shape, offset, nbytes = (rows[1] - rows[0], *shape[1:]), offset + rows[0] * row, (rows[1] - rows[0]) * row
        out = torch.empty(shape, dtype=dtype)
        flat = out.view(-1)
        if info.type.plain and torch_dtype(info.type.plain) == dtype:
            part.file.read_into(flat.view(torch.uint8).numpy().data, offset)
            return out
        step = _DATA_READ // info.type.block_bytes * info.type.block_bytes
        values = info.type.block_size
        raw = torch.empty(min(step, nbytes), dtype=torch.uint8)
        for start in range(0, nbytes, step):
            piece = raw[: min(step, nbytes - start)]
            part.file.read_into(piece.numpy().data, offset + start)
            first = start // info.type.block_bytes * values
            count = len(piece) // info.type.block_bytes * values
            dequantize(piece, info.type, flat[first : first + count])
        return out
