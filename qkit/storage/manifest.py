"""qkit_manifest.json: what a converted folder holds, how it was made, and whether it is finished.

A conversion that stops half-way resumes from it, so it is written like every other file: whole or not at all.
It is deterministic (sorted, no times, no paths): the same conversion gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import QkitError
from .files import is_inside, os_error, read_json
from .writer import FileDigest, write_file

MANIFEST = "qkit_manifest.json"
SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 4 << 20
_HINT = "the folder was not written by qkit, or was edited since: convert again with --restart"


def file_entry(digest: FileDigest) -> dict[str, Any]:
    """A manifest's entry for one file: {"sha256": hex, "bytes": int}."""
    return {"sha256": digest.sha256, "bytes": digest.nbytes}


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileDigest:
    """SHA-256 and size of a file, streamed; `progress` is called with the bytes of each step."""
    digest, nbytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:
            while n := file.readinto(buffer):
                digest.update(buffer[:n])
                nbytes += n
                if progress:
                    progress(n)
    except OSError as error:
        raise os_error("read", path, error) from error
    return FileDigest(digest.hexdigest(), nbytes)


@dataclass
class Manifest:
    """What a converted folder holds.

    identity  what decides the output: source, options, versions. Two conversions that agree here may share files
    files     relative name -> {"sha256", "bytes"} of every finished file but the manifest itself
    tensors   tensor name -> what was done to it (scheme, error, fallback, ...)
    sources   source tensor name -> digest of the values that were read
    complete  False while the conversion is under way
    """

    identity: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def save(self, folder: str | Path) -> FileDigest:
        """Write it to `folder`. Raises QkitError if the system refuses, ValueError for values JSON lacks (NaN)."""
        table = {
            "schema": SCHEMA,
            "complete": self.complete,
            "identity": self.identity,
            "files": self.files,
            "tensors": self.tensors,
            "sources": self.sources,
        }
        text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return write_file(Path(folder) / MANIFEST, text.encode("utf-8") + b"\n")

    @classmethod
    def find(cls, folder: str | Path | None) -> Manifest | None:
        """The manifest of `folder`, None where there is no folder or none in it. Raises QkitError for a broken one."""
        return None if folder is None or not Path(folder, MANIFEST).is_file() else cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of `folder`; raises QkitError where there is none or it is not one."""
        path = Path(folder) / MANIFEST
        if not os.path.exists(path):
            raise QkitError(f"{folder} has no {MANIFEST}", "only folders written by qkit have one")
        table, _ = read_json(path, _HINT)
        schema = table.get("schema")
        if type(schema) is not int:
            raise QkitError(f"{path} is not a qkit manifest: it has no schema number", _HINT)
        if schema != SCHEMA:
            raise QkitError(f"{path} has schema {schema}, this qkit reads {SCHEMA}", "use the qkit that wrote it")
        problem = _problem(table)
        if problem:
            raise QkitError(f"{path} is not a valid manifest: {problem}", _HINT)
        return cls(**{key: table[key] for key in ("identity", "files", "tensors", "sources", "complete")})

    def verify(self, folder: str | Path, progress: Callable[[int], None] | None = None) -> list[str]:
        """Compare `folder` with the manifest, byte for byte; returns the problems, in a fixed order.

        progress is called with the number of bytes hashed since the last call, from more than one thread.
        """
        folder = Path(folder)
        names = sorted(self.files)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: self._check(folder, name, progress), names)
            problems = [problem for problem in found if problem]
        try:
            extra = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in self.files)
        except OSError as error:
            raise os_error("read", folder, error) from error
        problems += [f"{name}: not in the manifest" for name in extra]
        if not self.complete:
            problems.append("the conversion is not complete")
        return problems

    def _check(self, folder: Path, name: str, progress: Callable[[int], None] | None) -> str | None:
        path, expected = folder / name, self.files[name]
        if not os.path.isfile(path):
            return f"{name}: missing"
        size = os.path.getsize(path)
        if size != expected["bytes"]:
            return f"{name}: {size} bytes, expected {expected['bytes']}"
        try:
            found = hash_file(path, progress)
        except QkitError as error:
            return f"{name}: {error.message}"
        if found.sha256 != expected["sha256"]:
            return f"{name}: its content changed (SHA-256 differs)"
        return None


def _problem(table: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's table, or None."""
    table.setdefault("sources", {})  # manifests of 0.1 have none
    for key in ("identity", "files", "tensors", "sources"):
        if not isinstance(table.get(key), dict):
            return f"{key} is not a table"
    if type(table.get("complete")) is not bool:
        return "complete is not true or false"
    for name, entry in table["files"].items():
        if not is_inside(name) or name == MANIFEST:
            return f"the file name {name!r} is not allowed"
        if not isinstance(entry, dict):
            return f"the entry of {name!r} is not a table"
        sha256, nbytes = entry.get("sha256"), entry.get("bytes")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or type(nbytes) is not int or nbytes < 0:
            return f"the entry of {name!r} lacks a SHA-256 or a size"
    for name, entry in table["tensors"].items():
        if not isinstance(entry, dict):
            return f"the entry of tensor {name!r} is not a table"
    return None
