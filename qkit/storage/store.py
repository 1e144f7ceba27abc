"""Where files lie: a `Store` opens, lists and writes them by name. Here folders; a bucket can be another one.

Readers and writers know nothing else: what is in a file is their business, how its bytes are reached is the store's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

_CHUNK = 4 << 20


@dataclass(frozen=True)
class FileDigest:
    """What was written or read: SHA-256 (hex) and size in bytes."""

    sha256: str
    nbytes: int


class Reader(Protocol):
    """One open file. Thread-safe: reading keeps no position.

    label   what messages call it
    name    its name in the store
    nbytes  its size when it was opened
    """

    label: str
    name: str
    nbytes: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on. Raises QkitError where the file ends before that, cannot be read, or is no
        longer what was opened."""
        ...

    def close(self) -> None:
        """Harmless when already closed; happens by itself when the object goes away."""
        ...


class Store(Protocol):
    """Files by relative name: "config.json", "additional_chat_templates/tool.jinja"."""

    @property
    def label(self) -> str:
        """What messages call it."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in `folder`, sorted; [] where there is no such folder. Raises QkitError where it
        cannot be listed, or holds a link to a file that is not there."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def open(self, name: str) -> Reader:
        """Raises QkitError where there is no such file, or it cannot be read."""
        ...

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        """Write a file whole or not at all; a chunk may be reused once the next one is asked for. Whatever `chunks`
        raises passes through. Raises QkitError where the system refuses."""
        ...


def read_bytes(reader: Reader, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file, by default all of them."""
    buffer = bytearray(reader.nbytes - offset if length is None else length)
    reader.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def read_file(store: Store, name: str) -> bytes:
    """A whole file."""
    reader = store.open(name)
    try:
        return read_bytes(reader)
    finally:
        reader.close()


def hash_file(store: Store, name: str, progress: Callable[[int], None] | None = None) -> FileDigest:
    """SHA-256 and size of a file, streamed; `progress` is called with the bytes of each step."""
    reader = store.open(name)
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(_CHUNK, max(1, reader.nbytes))))
    try:
        while done < reader.nbytes:
            piece = buffer[: min(len(buffer), reader.nbytes - done)]
            reader.read_into(piece, done)
            digest.update(piece)
            done += len(piece)
            if progress:
                progress(len(piece))
    finally:
        reader.close()
    return FileDigest(digest.hexdigest(), done)
