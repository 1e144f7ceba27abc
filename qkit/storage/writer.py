"""Writing files that are either whole under their final name or not there at all.

Everything goes to a hidden temporary in the same folder, which is fsynced and then renamed; the SHA-256 is
computed on the way, in a thread beside the writing one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..spec.dtypes import TensorMeta, dtype_name
from .files import os_error

if TYPE_CHECKING:
    import torch

TEMPORARY_SUFFIX = ".qkit-tmp"
# Large enough to hide the hand-over between the two threads, small enough that the bytes are still in the
# cache when the second of them gets there.
_CHUNK = 4 << 20
_DEFAULT_METADATA = {"format": "pt"}  # transformers refuses files without it


@dataclass(frozen=True)
class FileDigest:
    """What was written: SHA-256 (hex) and size in bytes."""

    sha256: str
    nbytes: int


class _Output:
    """The temporary being written, and the hash of what was written so far."""

    def __init__(self, path: Path, temporary: Path, fd: int, pool: ThreadPoolExecutor):
        self._path, self._fd, self._pool = path, fd, pool
        self.temporary = temporary
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: memoryview) -> None:
        """Append `data`; the caller may change it once this returns."""
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            if len(chunk) < 1 << 16:  # a hand-over costs more than hashing this
                self._hash.update(chunk)
                self._write_all(chunk)
            else:
                hashed = self._pool.submit(self._hash.update, chunk)
                try:
                    self._write_all(chunk)
                finally:
                    hashed.result()
        self.nbytes += len(data)

    def _write_all(self, chunk: memoryview) -> None:
        try:
            done = 0
            while done < len(chunk):
                done += os.write(self._fd, chunk[done:])
        except OSError as error:
            raise os_error("write", self._path, error) from error

    def digest(self) -> FileDigest:
        return FileDigest(self._hash.hexdigest(), self.nbytes)


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; a file system that cannot sync a folder needs no syncing."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[_Output]:
    """Yield an output that becomes `path` if the block ends well, and vanishes if it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise os_error("write", path, error) from error
    try:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
                yield _Output(path, temporary, fd, pool)
            try:
                os.fsync(fd)
            except OSError as error:
                raise os_error("write", path, error) from error
        finally:
            os.close(fd)
        try:
            os.replace(temporary, path)
            _fsync_folder(path.parent)
        except OSError as error:
            raise os_error("write", path, error) from error
    except BaseException:  # KeyboardInterrupt too: nothing of ours may stay behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_file(path: str | Path, data: bytes) -> FileDigest:
    """Write `data` to `path`, whole or not at all. Raises QkitError if the system refuses."""
    with _replacing(Path(path)) as output:
        output.write(memoryview(data))
    return output.digest()


def copy_file(source: str | Path, path: str | Path) -> FileDigest:
    """Copy `source` byte for byte to `path`, whole or not at all. Raises QkitError if the system refuses."""
    with _replacing(Path(path)) as output:
        buffer = memoryview(bytearray(_CHUNK))
        try:
            with open(source, "rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    output.write(buffer[:n])
        except OSError as error:
            raise os_error("read", source, error) from error
    return output.digest()


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


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major; shares memory with a contiguous CPU tensor."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_safetensors(
    path: str | Path,
    entries: Sequence[tuple[str, TensorMeta]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write one safetensors file: the header from `entries`, then `tensors`, taken one at a time in that order.

    A tensor may be reused once the next one is asked for. metadata: the header's string table (default
    {"format": "pt"}, which transformers requires).

    Raises ValueError where the tensors do not match the entries (dtype, shape, number), QkitError if the
    system refuses. Whatever `tensors` raises passes through. In every case nothing is left behind.
    """
    header = safetensors_header(entries, metadata)
    with _replacing(Path(path)) as output:
        output.write(memoryview(header))
        position = 0
        for tensor in tensors:
            if position == len(entries):
                raise ValueError(f"more tensors than the {len(entries)} announced")
            name, meta = entries[position]
            actual = TensorMeta(dtype_name(tensor.dtype), tuple(tensor.shape))
            if actual != meta:
                raise ValueError(f"{name}: announced {meta}, got {actual}")
            output.write(tensor_bytes(tensor))
            position += 1
        if position != len(entries):
            raise ValueError(f"{position} tensors where {len(entries)} were announced")
    return output.digest()


def remove_temporaries(folder: str | Path) -> int:
    """Delete what writers killed in mid-write left in `folder`; returns how many files. Only safe while no other
    process writes there."""
    removed = 0
    for path in sorted(Path(folder).glob(f".*{TEMPORARY_SUFFIX}")):
        try:
            path.unlink()
        except OSError as error:
            raise os_error("remove", path, error) from error
        removed += 1
    return removed
