"""What was finished since a manifest was last written: one line of JSON each, appended.

A manifest names every tensor, so writing it whole for each finished file would take time that is quadratic in the size
of a model. A line counts once its newline is there; what a stop left half-written, and whatever follows it, does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..untrusted import parse_json
from .files import os_error
from .local import fsync_folder, write_all
from .store import Store, read_file

JOURNAL = "qkit_manifest.journal"


def append(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a line; it is on the disk when this returns. Raises QkitError where the system refuses."""
    line = json.dumps(entry, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    path = folder / JOURNAL
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            write_all(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_folder(folder)
    except OSError as error:
        raise os_error("write", path, error) from error


def entries(store: Store) -> list[dict[str, Any]]:
    """The whole lines that are JSON objects, up to the first that is not one; [] where there is no journal."""
    found: list[dict[str, Any]] = []
    if store.has(JOURNAL):
        *lines, _torn = read_file(store, JOURNAL).split(b"\n")
        for line in lines:
            try:
                entry = parse_json(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            found.append(entry)
    return found
