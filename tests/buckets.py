"""A bucket in memory, in place of the library that reaches real ones, and what goes wrong with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from qkit.storage.remote import Found, Passing, changed


class Bucket:
    """Objects in memory, by name in the bucket; fail(method, name, n): raises what the n-th call is to meet."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self.fail: Callable[[str, str, int], None] = lambda method, name, n: None
        self.calls: list[tuple[str, str]] = []
        self.fetched = self.writes = 0
        self.lock = threading.Lock()

    def at(self, prefix: str) -> Memory:
        return Memory(self, prefix)

    def below(self, prefix: str) -> dict[str, bytes]:
        return {n[len(prefix) + 1 :]: data for n, (data, _) in self.files.items() if n.startswith(prefix + "/")}


class Memory:
    """`remote.Objects` of a `Bucket`."""

    def __init__(self, bucket: Bucket, prefix: str):
        self.bucket, self.prefix, self.label = bucket, prefix, f"s3://bucket/{prefix}"

    def _call(self, method: str, name: str) -> str:
        with self.bucket.lock:
            n = len(self.bucket.calls)
            self.bucket.calls.append((method, name))
        self.bucket.fail(method, name, n)
        return f"{self.prefix}/{name}"

    def list(self, folder: str, deep: bool = False) -> list[Found]:
        inside = self._call("list", folder) if folder else self._call("list", "").rstrip("/")
        below = [n for n in self.bucket.files if n.startswith(inside + "/")]
        return [self._found(n) for n in below if deep or "/" not in n[len(inside) + 1 :]]

    def _found(self, name: str) -> Found:
        data, tag = self.bucket.files[name]
        return Found(name[len(self.prefix) + 1 :], len(data), tag)

    def find(self, name: str) -> Found | None:
        full = self._call("find", name)
        return self._found(full) if full in self.bucket.files else None

    def get(self, found: Found, start: int, end: int) -> bytes:
        full = self._call("get", found.name)
        data, tag = self.bucket.files.get(full, (b"", ""))
        if tag != found.tag:
            raise changed(f"{self.label}/{found.name}")
        with self.bucket.lock:
            self.bucket.fetched += end - start
        return data[start:end]

    def _store(self, full: str, data: bytes) -> str:
        with self.bucket.lock:
            self.bucket.writes += 1
            tag = f"tag-{self.bucket.writes}"
            self.bucket.files[full] = (bytes(data), tag)
        return tag

    def put(self, name: str, data: bytes | bytearray) -> None:
        self._store(self._call("put", name), bytes(data))

    def put_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        full = self._call("put_if", name)
        if (self.bucket.files[full][1] if full in self.bucket.files else None) != tag:
            return None
        done = self._store(full, data)
        self.bucket.fail("answer", name, len(self.bucket.calls))
        return done

    def upload(self, name: str, parts: Iterator[bytearray], part_bytes: int) -> None:
        full = self._call("upload", name)
        whole = list(parts)
        assert all(len(part) == part_bytes for part in whole[:-1]) and whole[-1]
        self._store(full, b"".join(whole))

    def delete(self, name: str) -> None:
        self.bucket.files.pop(self._call("delete", name), None)


def put(bucket: Bucket, prefix: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.at(prefix).put(str(path.relative_to(folder)), path.read_bytes())


def breaking(times: int, *methods: str) -> Callable[[str, str, int], None]:
    """Calls of these methods fail that often, each time as the first of them begins, then once works."""
    count = 0

    def fail(method: str, name: str, n: int) -> None:
        nonlocal count
        if method in methods:
            count += 1
            if count % (times + 1):
                raise Passing("the line broke")

    return fail
