"""Where a result goes: a folder here, or a prefix in an object store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..storage.places import Place, scheme_of
from . import workspace

if TYPE_CHECKING:
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from ..storage.store import Store
    from .plan import Plan
    from .tasks import Shard

Out = Path | Place


class Work(Protocol):
    """The locked place of one run: its files, and the manifest that says which of them are finished.

    label      what messages call it
    scratch    a folder for temporary files; None: that of the system
    inherited  files that earlier runs finished"""

    manifest: Manifest
    label: str
    scratch: Path | None
    inherited: frozenset[str]

    @property
    def store(self) -> Store: ...

    def has(self, file: str) -> bool:
        """Whether `file` is finished."""
        ...

    def note(self, **new: Mapping[str, Any]) -> None:
        """Add to the manifest (`Manifest.add`) what is finished; it stays so whatever happens next."""
        ...

    def save(self) -> None:
        """Write the manifest whole."""
        ...

    def drop(self, files: Iterable[str]) -> None:
        """Forget finished files that turned out to be damaged: the same command writes them again."""
        ...

    def reveal(self) -> None:
        """Put in place what is kept back until everything is verified."""
        ...

    def publish(self) -> None:
        """Give the result, which is complete, its name."""
        ...


def resolve_out(out: str | os.PathLike[str], inputs: Iterable[str | None] = ()) -> Out:
    """`workspace.resolve_out`, or the place that a name with a scheme means."""
    text = os.fspath(out)
    if scheme_of(text) is None:
        return workspace.resolve_out(out, inputs)
    from .remote_workspace import resolve_remote

    return resolve_remote(text, inputs)


def finished(out: Out, identity: Mapping[str, Any], restart: bool) -> Manifest | None:
    """The manifest of a finished, identical conversion at `out`; None where it is free or may be replaced.

    Raises QkitError for whatever else is there."""
    if isinstance(out, Path):
        workspace.settle(out)
        return workspace.finished(out, identity, restart)
    from .remote_workspace import finished_remote

    return finished_remote(out, identity, restart)


def open_work(plan: Plan, identity: Mapping[str, Any], expected: Iterable[str]) -> AbstractContextManager[Work]:
    """The place of the work in progress, locked. Raises QkitError as `workspace.open_workspace`."""
    if isinstance(plan.out, Path):
        return workspace.open_workspace(plan.out, identity, expected, plan.options.restart)
    from .remote_workspace import open_remote_workspace

    return open_remote_workspace(plan.out, identity, expected, plan.options.restart, part_bytes(plan.shards))


def remote_store(plan: Plan) -> Store:
    """Where a worker puts files of a run that holds the lock; config and index are the run's own affair."""
    from ..storage.remote import RemoteStore
    from .remote_workspace import open_objects

    assert not isinstance(plan.out, Path)
    return RemoteStore(open_objects(plan.out), part_bytes=part_bytes(plan.shards))


def part_bytes(shards: Sequence[Shard]) -> int:
    """Of an upload, for the largest file."""
    from ..storage.remote import part_bytes

    return part_bytes(max(shard.bytes_out for shard in shards))


def is_remote(source: Source) -> bool:
    """Whether its tensors are read over a network."""
    from ..storage.remote import RemoteStore

    return isinstance(source.folder, RemoteStore)


def transfers(source: Source, out: Out, shards: Sequence[Shard]) -> Callable[[int], int]:
    """(workers) -> bytes of memory for what is on its way over a network, where source or result lies there."""
    from ..storage.remote import reading_takes, writing_takes

    reads, writes = is_remote(source), not isinstance(out, Path)
    taken = writing_takes(part_bytes(shards)) if writes else 0
    return lambda workers: taken + (reading_takes(workers) if reads else 0)
