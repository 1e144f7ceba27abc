"""A folder as a `Store`: files that are either whole under their final name or not there at all.

Everything goes to a hidden temporary in the same folder, which is fsynced and then renamed; the SHA-256 is
computed on the way, and what was written is sent to the disk, in threads beside the writing one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import QkitError
from .files import os_error
from .store import FileDigest, Reader, Store, read_bytes

TEMPORARY_SUFFIX = ".qkit-tmp"
# Large enough to hide the hand-over between the two threads, small enough that the bytes are still in the
# cache when the second of them gets there.
_CHUNK = 4 << 20
# Sent to the disk at a time. Left to itself the system begins after seconds, or when much of its memory is waiting,
# and the fsync at the end waits for all that.
_SYNC = 32 << 20
_MAX_READ = 1 << 30  # Linux reads at most 2 GiB - 4 KiB per call


class LocalFile:
    """`store.Reader` of a file on a disk; it counts as changed when its size or its time does."""

    def __init__(self, path: Path):
        self.path, self.label, self.name = path, str(path), path.name
        try:
            # Opening a pipe would otherwise wait for somebody who writes into it.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise os_error("read", path, error) from error
        self._close = weakref.finalize(self, os.close, self._fd)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise QkitError(f"{path} is not a regular file", "name a file, not a folder or a device")
        self._stamp = self._look()
        self.nbytes = self._stamp[0]

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(buffer):
                n = os.preadv(self._fd, [buffer[done : done + _MAX_READ]], offset + done)
                if n == 0:
                    break
                done += n
            changed = self._look() != self._stamp
        except OSError as error:
            raise os_error("read", self.path, error) from error
        if done < len(buffer) or changed:
            raise QkitError(f"{self.path} changed while it was being read", "leave it alone and start again")

    def close(self) -> None:
        self._close()


@dataclass(frozen=True)
class LocalStore:
    """`store.Store` over a folder."""

    folder: Path

    @property
    def label(self) -> str:
        return str(self.folder)

    def names(self, folder: str = "") -> list[str]:
        place = self.folder / folder
        if folder and not place.is_dir():
            return []
        try:
            found = sorted(os.listdir(place))
            links = [name for name in found if (place / name).is_symlink() and not (place / name).exists()]
            files = [name for name in found if (place / name).is_file()]
        except OSError as error:
            raise os_error("read", place, error) from error
        if links:
            raise QkitError(f"{place / links[0]} is a link to a file that is not there", "fetch it again")
        return [f"{folder}/{name}" if folder else name for name in files]

    def has(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except OSError as error:
            raise os_error("read", self.folder / name, error) from error

    def open(self, name: str) -> Reader:
        return LocalFile(self.folder / name)

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        path = self.folder / name
        if "/" in name:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise os_error("write", path, error) from error
        with _replacing(path) as output:
            for chunk in chunks:
                output.write(chunk)
                del chunk  # it keeps its tensor alive
        return output.digest()


def at(place: str | os.PathLike[str] | Store) -> Store:
    """The store for a folder's path; a store is returned as it is."""
    return LocalStore(Path(place)) if isinstance(place, str | os.PathLike) else place


def open_file(file: str | os.PathLike[str] | Reader) -> Reader:
    """A reader of the file at a path; a reader is returned as it is. Raises QkitError as `Store.open`."""
    if not isinstance(file, str | os.PathLike):
        return file
    path = Path(file)
    return at(path.parent).open(path.name)


def read_small(path: Path, most: int) -> bytes:
    """A whole file of at most `most` bytes. Raises QkitError for a longer one, and for what is no file."""
    file = open_file(path)
    try:
        if file.nbytes > most:
            raise QkitError(f"{path} is {file.nbytes} bytes long, and {most} are the most that are read of such a file")
        return read_bytes(file)
    finally:
        file.close()


class _Output:
    """The temporary being written, and the hash of what was written so far."""

    def __init__(self, path: Path, temporary: Path, fd: int, pool: ThreadPoolExecutor):
        self._path, self._fd, self._pool = path, fd, pool
        self.temporary = temporary
        self._hash = hashlib.sha256()
        self.nbytes = 0
        self._synced = 0
        self._syncing: Future[None] | None = None

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
            self.nbytes += len(chunk)
            self._sync()

    def _sync(self) -> None:
        """Begin to send what there is to the disk, if that is much and the last such is done."""
        if self.nbytes - self._synced < _SYNC or not hasattr(os, "fdatasync"):
            return
        if self._syncing is None or self._syncing.done():
            self.check()
            self._synced, self._syncing = self.nbytes, self._pool.submit(os.fdatasync, self._fd)

    def check(self) -> None:
        """Raises QkitError where the last sending failed: the system says so once, and not at the end again."""
        if self._syncing is not None:
            try:
                self._syncing.result()
            except OSError as error:
                raise os_error("write", self._path, error) from error

    def _write_all(self, chunk: memoryview) -> None:
        try:
            write_all(self._fd, chunk)
        except OSError as error:
            raise os_error("write", self._path, error) from error

    def digest(self) -> FileDigest:
        return FileDigest(self._hash.hexdigest(), self.nbytes)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however little the system takes at a time. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def fsync_folder(folder: Path) -> None:
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
            with ThreadPoolExecutor(2, thread_name_prefix="output") as pool:
                output = _Output(path, temporary, fd, pool)
                yield output
                output.check()
            try:
                os.fsync(fd)
            except OSError as error:
                raise os_error("write", path, error) from error
        finally:
            os.close(fd)
        try:
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except OSError as error:
            raise os_error("write", path, error) from error
    except BaseException:  # KeyboardInterrupt too: nothing of ours may stay behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_temporaries(folder: str | Path) -> int:
    """Delete what writers killed in mid-write left in `folder` and below; returns how many files. Only safe while no
    other process writes there."""
    removed = 0
    for path in sorted(Path(folder).rglob(f".*{TEMPORARY_SUFFIX}")):
        try:
            path.unlink()
        except OSError as error:
            raise os_error("remove", path, error) from error
        removed += 1
    return removed
