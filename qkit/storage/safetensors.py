"""Reading safetensors files: a strict header parser, and tensors in memory of their own.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of header length (little-endian), the
header (JSON), then the data. Like the reference reader this one refuses holes and overlaps; it also
refuses duplicate names, which other readers silently drop.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import QkitError
from ..spec.dtypes import ITEMSIZE, TensorMeta
from ..untrusted import parse_json
from .buffers import empty
from .local import open_file
from .samples import sample
from .store import Reader, read_bytes

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
_BROKEN = "the file is damaged or was not downloaded completely: fetch it again"


class UnknownDtype(ValueError):
    """The format grows: a type we do not know is newer than we are, not damage."""


class Entry(NamedTuple):
    """Where a tensor lies: meta, and the first byte of its data counted from the start of the file."""

    meta: TensorMeta
    offset: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {name!r} appears twice")
    return result


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _entry(name: str, info: Any, data_start: int) -> Entry:
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    meta, offsets = checked_meta(name, info["dtype"], info["shape"]), info["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise ValueError(f"tensor {name!r} has invalid data_offsets")
    if offsets[1] - offsets[0] != meta.nbytes:
        raise ValueError(
            f"tensor {name!r}: {meta.dtype} {list(meta.shape)} takes {meta.nbytes} bytes, its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(meta, data_start + offsets[0])


def checked_meta(name: str, dtype: Any, shape: Any) -> TensorMeta:
    """The type and shape that a header gives a tensor. Raises ValueError for what a tensor cannot have."""
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if dtype not in ITEMSIZE:
        raise UnknownDtype(f"tensor {name!r} has the unknown dtype {dtype[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 64 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"tensor {name!r} has the invalid shape {str(shape)[:100]}")
    span = 1
    for n in shape:
        span *= max(n, 1)
        if span >= 1 << 63:  # even an empty tensor must have strides that fit
            raise ValueError(f"tensor {name!r} has the invalid shape {str(shape)[:100]}")
    return TensorMeta(dtype, tuple(shape))


def parse_header(header: bytes, file_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries in file order, metadata) of a header that is followed by data up to `file_bytes`.

    Raises ValueError, saying what is wrong, for anything the format does not allow.
    """
    if header[:1] != b"{":
        raise ValueError("the header does not begin with '{'")
    table = parse_json(header, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    metadata = table.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a table of strings")
    data_start = 8 + len(header)
    entries = {}
    for name, info in table.items():
        entries[name] = _entry(name, info, data_start)
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].meta.nbytes))
    position = data_start
    for name, entry in ordered:
        if entry.offset != position:
            what = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {what}")
        position += entry.meta.nbytes
    if position != file_bytes:
        raise ValueError(f"the header describes {position} bytes, the file has {file_bytes}")
    return dict(ordered), metadata


class SafetensorsFile:
    """One open safetensors file. The header is validated here; `read` is thread-safe.

    Raises QkitError if the file cannot be read or its header is not valid.
    """

    def __init__(self, file: str | os.PathLike[str] | Reader):
        self.file = open_file(file)
        self.nbytes = self.file.nbytes
        try:
            self.entries, self.metadata = parse_header(self._header(), self.nbytes)
        except UnknownDtype as error:
            self.close()
            hint = "a newer qkit may; or take a version of the model in BF16, F16 or F32"
            raise QkitError(f"{self.file.label}: {error}", hint) from error
        except ValueError as error:
            self.close()
            raise QkitError(f"{self.file.label} is not a valid safetensors file: {error}", _BROKEN) from error
        except BaseException:
            self.close()
            raise

    def _header(self) -> bytes:
        """The header's bytes; every length is compared with the file before anything is allocated."""
        start = read_bytes(self.file, 0, min(8, self.nbytes))
        if start == b"version ":
            raise QkitError(f"{self.file.label} is a Git LFS pointer, not the file itself", "run: git lfs pull")
        if len(start) < 8:
            raise ValueError(f"it is {self.nbytes} bytes long")
        length = int.from_bytes(start, "little")
        if length > self.nbytes - 8:
            raise ValueError(f"its header claims {length} bytes, the file has {self.nbytes - 8} after the length")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length} bytes is over the format's limit of {MAX_HEADER_BYTES}")
        return read_bytes(self.file, 8, length)

    def close(self) -> None:
        """Close the file; harmless when already closed. Happens by itself when the object goes away."""
        self.file.close()

    def names(self) -> list[str]:
        """Tensor names, in the order of their data."""
        return list(self.entries)

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape; KeyError for an unknown name."""
        return self.entries[name].meta

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own; KeyError for an unknown name, QkitError if the file changed."""
        return self._at(*self.entries[name])

    def _at(self, meta: TensorMeta, offset: int) -> torch.Tensor:
        import torch

        tensor = empty(meta)
        if meta.numel:
            self.file.read_into(tensor.view(-1).view(torch.uint8).numpy().data, offset)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A part of the tensor along its first dimension, in memory of its own; KeyError for an unknown name, QkitError
        if the file changed."""
        meta, offset = self.entries[name]
        row = TensorMeta(meta.dtype, meta.shape[1:]).nbytes
        return self._at(TensorMeta(meta.dtype, (stop - start, *meta.shape[1:])), offset + start * row)

    def sample(self, name: str) -> bytes:
        """A few spots of the tensor's bytes, all of a small one's."""
        meta, offset = self.entries[name]
        return sample(self.file, offset, meta.nbytes)
