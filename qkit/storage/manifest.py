"""qkit_manifest.json: what a converted folder holds, how it was made, and whether it is finished.

A conversion that stops half-way resumes from it, so it is written like every other file: whole or not at all. What is
finished while one is under way is noted in a journal beside it (`journal.py`), and folded in where it is read. It is
deterministic (sorted, no times, no paths): the same conversion gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import QkitError
from . import journal
from .files import is_inside, read_json
from .local import at
from .store import FileDigest, Store, hash_file
from .writer import write_file

MANIFEST = "qkit_manifest.json"
SCHEMA = 1
NOTED = ("files", "tensors", "sources")  # the tables that a line of the journal adds to
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HINT = "not written by qkit, or edited or damaged since: move the folder away and convert again"


def file_entry(digest: FileDigest) -> dict[str, Any]:
    """A manifest's entry for one file: {"sha256": hex, "bytes": int}."""
    return {"sha256": digest.sha256, "bytes": digest.nbytes}


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

    def add(self, **new: Mapping[str, Any]) -> None:
        """Add to the tables `NOTED`, by their names."""
        for key, entries in new.items():
            getattr(self, key).update(entries)

    def forget(self, files: Iterable[str]) -> None:
        """Files that turned out to be damaged are not there any more, and nothing is complete."""
        for file in files:
            self.files.pop(file, None)
        self.complete = False

    def save(self, place: str | Path | Store) -> FileDigest:
        """Write it to a folder. Raises QkitError if the system refuses, ValueError for values JSON lacks (NaN)."""
        table = {
            "schema": SCHEMA,
            "complete": self.complete,
            "identity": self.identity,
            "files": self.files,
            "tensors": self.tensors,
            "sources": self.sources,
        }
        text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return write_file(at(place), MANIFEST, text.encode("utf-8") + b"\n")

    @classmethod
    def find(cls, place: str | Path | Store | None) -> Manifest | None:
        """The manifest of a folder, None where there is no folder or none in it. Raises QkitError for a broken one."""
        return None if place is None or not at(place).has(MANIFEST) else cls.load(place)

    @classmethod
    def load(cls, place: str | Path | Store) -> Manifest:
        """The manifest of a folder; raises QkitError where there is none or it is not one."""
        store = at(place)
        if not store.has(MANIFEST):
            raise QkitError(f"{store.label} has no {MANIFEST}", "only folders written by qkit have one")
        path = f"{store.label}/{MANIFEST}"
        table = read_json(store, MANIFEST, _HINT)
        schema = table.get("schema")
        if type(schema) is not int:
            raise QkitError(f"{path} is not a qkit manifest: it has no schema number", _HINT)
        if schema != SCHEMA:
            raise QkitError(f"{path} has schema {schema}, this qkit reads {SCHEMA}", "use the qkit that wrote it")
        problem = _problem(table)
        if problem:
            raise QkitError(f"{path} is not a valid manifest: {problem}", _HINT)
        found = cls(**{key: table[key] for key in ("identity", *NOTED, "complete")})
        for entry in journal.entries(store):
            new: dict[str, Any] = {key: entry.get(key) for key in NOTED}
            if _problem({"identity": {}, "complete": False, **new}):
                break
            found.add(**new)
        return found

    def verify(self, place: str | Path | Store, progress: Callable[[int], None] | None = None) -> list[str]:
        """Compare a folder with the manifest, byte for byte; returns the problems, in a fixed order.

        progress is called with the number of bytes hashed since the last call, from more than one thread.
        """
        store = at(place)
        names = sorted(self.files)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: self._check(store, name, progress), names)
            problems = [problem for problem in found if problem]
        extra = [name for name in store.names() if name.endswith(".safetensors") and name not in self.files]
        problems += [f"{name}: not in the manifest" for name in extra]
        if not self.complete:
            problems.append("the conversion is not complete")
        return problems

    def _check(self, store: Store, name: str, progress: Callable[[int], None] | None) -> str | None:
        expected = self.files[name]
        try:
            if not store.has(name):
                return f"{name}: missing"
            found = hash_file(store, name, progress)
        except QkitError as error:
            return f"{name}: {error.message}"
        if found.nbytes != expected["bytes"]:
            return f"{name}: {found.nbytes} bytes, expected {expected['bytes']}"
        if found.sha256 != expected["sha256"]:
            return f"{name}: its content changed (SHA-256 differs)"
        return None


def _problem(table: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's table, or None."""
    table.setdefault("sources", {})  # manifests of 0.1 have none
    for key in ("identity", *NOTED):
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
