"""Room on the disk where a result will lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from .output import Out
from .tasks import Task
from .workspace import partial_dir

if TYPE_CHECKING:
    from ..sources.types import Sidecar


def room(sidecars: Iterable[Sidecar], tasks: Iterable[Task], scratch: int, out: Out) -> tuple[int, int | None]:
    """(bytes needed, bytes free) where `out` will lie; None where nothing counts them. Raises QkitError where they do
    not suffice."""
    needed = sum(t.bytes_out for t in tasks) + sum(sidecar.nbytes for sidecar in sidecars) + (16 << 20)
    if not isinstance(out, Path):
        return needed, None
    needed += scratch
    free = _free_disk(out)
    partial = partial_dir(out)
    reusable = sum(map(_bytes, partial.rglob("*"))) if partial.is_dir() else 0
    if needed > free + reusable:
        raise QkitError(
            f"{out} needs {units.size(needed)}, and {units.size(free + reusable)} are free there",
            "free some space or choose another disk with -o",
        )
    return needed, free


def _bytes(path: Path) -> int:
    """Of a file; 0 where it is none, or is gone by now: other machines may write there."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def _free_disk(out: Path) -> int:
    """Free bytes where `out` will lie. Raises QkitError where nothing can be written there."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise QkitError(f"cannot write into {parent}", "choose another output folder with -o")
    return shutil.disk_usage(parent).free
