"""Files in an object store as a `Store`: ranged reads, tried again where the network fails; writes whole or not at all.

What a library or a server has to do for that is `Objects`: s3:// and gs:// in object_store.py, the Hub in
sources/hub_files.py. What is read is pinned when it is opened: one that changes afterwards is an error, and no mixture.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

from ..errors import QkitError
from .store import FileDigest, Reader

T = TypeVar("T")

RANGE = 8 << 20  # bytes asked for at a time: larger ones were measured to take more memory and no less time
_READERS = 8  # ranges of large reads that are under way at once, whoever asks for them
PART = 16 << 20  # of an upload; an object has 10,000 of them at most
PARTS_AT_ONCE = 3
MAX_PARTS = 10_000
# Waits double from a fifth of a second to a quarter of a minute, a minute in all; what is asked first is given up
# sooner, since a name that is wrong looks like a server that is gone.
ATTEMPTS, ATTEMPTS_AT_FIRST = 10, 5
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.2, 15.0, 300.0


class Passing(Exception):
    """A failure that the next try may not meet. after: seconds to wait that the server asks for."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


@dataclass(frozen=True)
class Found:
    """An object as it was seen: its name, its size in bytes, and what changes when its content does."""

    name: str
    nbytes: int
    tag: str


class Objects(Protocol):
    """Objects below one prefix, by relative name. Every method raises Passing for what another try may mend, else
    QkitError; none tries again by itself. Thread-safe.

    label  the prefix as the user names it: s3://bucket/prefix"""

    label: str

    def list(self, folder: str, deep: bool = False) -> list[Found]:
        """Those directly in a folder ("": the prefix itself); deep: all below it."""
        ...

    def find(self, name: str) -> Found | None:
        """One object, None where there is none."""
        ...

    def get(self, found: Found, start: int, end: int) -> Any:
        """Bytes of it (anything with the buffer protocol); fewer where the answer was cut. Raises QkitError where it is
        no longer the one that was found."""
        ...

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Write a small object whole."""
        ...

    def put_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write it where it still has that tag, or (None) where there is none: its new tag; None where that is not so,
        which may be for an earlier try whose answer was lost."""
        ...

    def upload(self, name: str, parts: Iterator[bytearray], part_bytes: int) -> None:
        """Write a large object in parts, each of `part_bytes` but the last; it appears once all are there. Nothing of
        it stays where `parts` raises. Unlike the rest it tries again by itself: a part is held until it is there."""
        ...

    def delete(self, name: str) -> None:
        """Harmless where it is gone already."""
        ...


def changed(label: str) -> QkitError:
    return QkitError(f"{label} changed while it was being read", "leave it alone and start again")


def persist(what: str, do: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """do(), again where it raises Passing, after waits that grow. what: "read s3://...", for the message.

    Raises QkitError where every try failed."""
    delay = _FIRST_WAIT
    for attempt in range(1, attempts + 1):
        try:
            return do()
        except Passing as error:
            if attempt == attempts:
                raise QkitError(
                    f"cannot {what}: {error} ({attempts} tries)",
                    "check the network and the service; the same command goes on where this one stopped",
                ) from error
            pause = delay * random.uniform(0.5, 1.0)  # not all readers at the same moment
            time.sleep(pause if error.after is None else min(max(pause, error.after), _LONGEST_ASKED))
            delay = min(2 * delay, _LONGEST_WAIT)
    raise AssertionError("no attempts")


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="qkit-range")


class RemoteFile:
    """`store.Reader` of an object."""

    def __init__(self, objects: Objects, found: Found):
        self._objects, self._found = objects, found
        self.label, self.name, self.nbytes = f"{objects.label}/{found.name}", found.name, found.nbytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > self.nbytes:
            raise changed(self.label)
        if len(buffer) <= RANGE:
            return self._fill(buffer, offset)
        pieces = [
            _readers().submit(self._fill, buffer[at : at + RANGE], offset + at) for at in range(0, len(buffer), RANGE)
        ]
        try:
            for piece in pieces:
                piece.result()
        finally:  # the buffer is the caller's again: nothing may write there any more
            for piece in pieces:
                piece.cancel()
            wait(pieces)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        if not len(buffer):
            return

        def once() -> None:
            data = memoryview(self._objects.get(self._found, offset, offset + len(buffer))).cast("B")
            if len(data) != len(buffer):
                raise Passing(f"the answer was cut short: {len(data)} of {len(buffer)} bytes")
            buffer[:] = data

        persist(f"read {self.label}", once)

    def close(self) -> None:
        pass


class RemoteStore:
    """`store.Store` over objects.

    fixed: they are listed once, and what they are then is what is read; for what nothing is written to"""

    def __init__(self, objects: Objects, fixed: bool = False, part_bytes: int = PART):
        self.objects, self._fixed, self._part_bytes = objects, fixed, part_bytes
        self._listed: dict[str, dict[str, Found]] = {}
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        return self.objects.label

    def _list(self, folder: str) -> dict[str, Found]:
        with self._lock:
            if folder in self._listed:
                return self._listed[folder]
        found = persist(f"list {self.label}", lambda: self.objects.list(folder), ATTEMPTS_AT_FIRST)
        listed = {each.name: each for each in found}
        if self._fixed:
            with self._lock:
                self._listed[folder] = listed
        return listed

    def _find(self, name: str) -> Found | None:
        if self._fixed:
            return self._list(name.rpartition("/")[0]).get(name)
        return persist(f"look at {self.label}/{name}", lambda: self.objects.find(name))

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._list(folder))

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def open(self, name: str) -> Reader:
        found = self._find(name)
        if found is None:
            raise QkitError(f"there is no {self.label}/{name}", "check the bucket and the path")
        return RemoteFile(self.objects, found)

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        digest, nbytes = hashlib.sha256(), 0

        def seen() -> Iterator[memoryview]:
            nonlocal nbytes
            for chunk in chunks:
                digest.update(chunk)
                nbytes += len(chunk)
                yield chunk

        parts = _parts(seen(), self._part_bytes)
        first = next(parts, bytearray())
        if len(first) < self._part_bytes:
            persist(f"write {self.label}/{name}", lambda: self.objects.put(name, first))
        else:
            self.objects.upload(name, _again(first, parts), self._part_bytes)
        return FileDigest(digest.hexdigest(), nbytes)


def _again(first: bytearray, rest: Iterator[bytearray]) -> Iterator[bytearray]:
    yield first
    yield from rest


def _parts(chunks: Iterable[memoryview], size: int) -> Iterator[bytearray]:
    """The chunks' bytes in pieces of `size`, each in memory of its own: a chunk is used again, a part is still on its
    way. The last may be shorter; none is empty."""
    part = bytearray()
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            taken = min(size - len(part), len(chunk) - at)
            part += chunk[at : at + taken]
            at += taken
            if len(part) == size:
                yield part
                part = bytearray()
        del chunk  # it keeps its tensor alive
    if part:
        yield part


def part_bytes(largest: int) -> int:
    """Bytes of a part with which an object of `largest` bytes can be uploaded: whole MiB, with room for headers."""
    return max(PART, -(-largest // (MAX_PARTS * 9 // 10) >> 20) + 1 << 20)


def reading_takes(workers: int) -> int:
    """Memory that ranges under way take, where `workers` threads read."""
    return (_READERS + workers) * RANGE


def writing_takes(part: int = PART) -> int:
    """Memory that parts under way take: those being sent, one being collected, one handed over."""
    return (PARTS_AT_ONCE + 2) * part
