"""The work in progress where the result is to be, in an object store, which knows no rename.

Finished files go to their place one by one; what makes a model of them, config.json and the index, is kept back until
everything is verified, and the manifest says last that the result is complete. Nothing that qkit did not write is
overwritten or deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..progress import notify
from ..storage.lease import LOCK, Lease
from ..storage.manifest import MANIFEST, Manifest
from ..storage.places import BUCKETS, Place, parse_place, scheme_of
from ..storage.remote import Found, Objects, RemoteStore, persist
from ..storage.store import FileDigest, Reader, hash_file
from ..storage.writer import write_file
from .containers import INDEX
from .workspace import difference, is_ours

if TYPE_CHECKING:
    from ..storage.store import Store

LAST = ("config.json", INDEX)  # without them no client takes the folder for a model


def resolve_remote(out: str, inputs: Iterable[str | None] = ()) -> Place:
    """Where the result goes. Raises QkitError for what is no prefix in a bucket, or is one with an input."""
    if scheme_of(out) not in BUCKETS:
        raise QkitError(f"qkit does not write to {out}", "use a folder, s3://bucket/prefix or gs://bucket/prefix")
    place = parse_place(out)
    if not place.prefix:
        raise QkitError(f"{place} is a whole bucket", f"choose a prefix in it, such as -o {place}/model")
    for given in inputs:
        if given and scheme_of(given) in BUCKETS:
            read = parse_place(given)
            if place.holds(read) or read.holds(place):
                raise QkitError(
                    f"the output {place} and the input {read} are one inside the other",
                    "choose another prefix with -o: nothing of the input's is ever overwritten",
                )
    return place


def open_objects(place: Place) -> Objects:
    from ..storage.object_store import open_objects

    return open_objects(place)


def _everything(objects: Objects) -> list[Found]:
    return persist(f"list {objects.label}", lambda: objects.list("", deep=True))


def finished_remote(place: Place, identity: Mapping[str, Any], restart: bool) -> Manifest | None:
    """The manifest of a finished, identical conversion at a place; None where there is none, or it may be replaced.

    Raises QkitError for whatever else is there. What an interrupted run left is left to `open_remote_workspace`."""
    objects = open_objects(place)
    found = {each.name for each in _everything(objects)} - {LOCK}
    manifest = Manifest.find(RemoteStore(objects)) if found else None
    if manifest is None:
        if found:
            raise QkitError(f"{place} holds {min(found)!r}, which qkit did not write", "choose another prefix with -o")
        return None
    if restart or not manifest.complete:
        return None
    if manifest.identity == identity:
        return manifest
    raise QkitError(f"{place} holds another conversion", "choose another prefix with -o, or replace it with --restart")


class KeptBack:
    """`store.Store` over another one, where files of some names are in memory until `reveal`; nothing is written once
    the lease is lost."""

    def __init__(self, store: RemoteStore, names: Iterable[str], lease: Lease):
        self._store, self._names, self._lease = store, frozenset(names), lease
        self._kept: dict[str, bytes] = {}

    @property
    def label(self) -> str:
        return self._store.label

    def names(self, folder: str = "") -> list[str]:
        kept = [name for name in self._kept if name.rpartition("/")[0] == folder]
        return sorted({*self._store.names(folder), *kept})

    def has(self, name: str) -> bool:
        return name in self._kept or self._store.has(name)

    def open(self, name: str) -> Reader:
        return Kept(f"{self.label}/{name}", name, self._kept[name]) if name in self._kept else self._store.open(name)

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        self._lease.check()
        if name not in self._names:
            return self._store.write(name, chunks)
        self._kept[name] = b"".join(bytes(chunk) for chunk in chunks)
        return hash_file(self, name)

    def reveal(self) -> None:
        """Write what was kept back."""
        for name in sorted(self._kept):
            self._lease.check()
            write_file(self._store, name, self._kept[name])


class Kept:
    """`store.Reader` of bytes in memory."""

    def __init__(self, label: str, name: str, data: bytes):
        self.label, self.name, self._data, self.nbytes = label, name, data, len(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        pass


class RemoteWorkspace:
    """The locked prefix of one run and its manifest, as `workspace.Workspace`. Use `open_remote_workspace`."""

    def __init__(self, out: Place, store: KeptBack, manifest: Manifest):
        self.out, self.manifest, self.inherited = out, manifest, frozenset(manifest.files)
        self._kept = store
        self.store: Store = store
        self.label = store.label
        self.scratch: Path | None = None

    def has(self, file: str) -> bool:
        """Whether `file` is finished. What an earlier run wrote was hashed before it is counted on."""
        return file in self.manifest.files

    def note(self, **new: Mapping[str, Any]) -> None:
        """Add to the manifest what is finished, and write it whole: objects do not grow."""
        self.manifest.add(**new)
        self.save()

    def save(self) -> None:
        """Write the manifest."""
        self.manifest.save(self.store)

    def drop(self, files: Iterable[str]) -> None:
        """Forget finished files that turned out to be damaged: the same command writes them again."""
        self.manifest.forget(files)
        self.save()

    def reveal(self) -> None:
        """Put in place what was kept back; only the manifest is missing then."""
        self._kept.reveal()

    def publish(self) -> None:
        """Nothing: everything is in its place once the manifest says that it is complete."""


@contextmanager
def open_remote_workspace(
    out: Place, identity: Mapping[str, Any], expected: Iterable[str], restart: bool, part_bytes: int
) -> Iterator[RemoteWorkspace]:
    """Lock the prefix, and go on from what an interrupted run left there; with `restart` discard that, or an earlier
    result, first.

    expected: the files that the run will write: a killed run may have left one that its manifest does not list yet.
    part_bytes: of uploads. Raises QkitError where another run holds it, where it belongs to another conversion, or
    holds anything that qkit did not write."""
    objects = open_objects(out)
    names = frozenset(expected)
    _check_ours(objects, names)  # before a lock is put among somebody's files
    lease = Lease(objects, notify)
    try:
        store = RemoteStore(objects, part_bytes=part_bytes)
        manifest, unrecorded = _check_ours(objects, names)
        if manifest is not None and restart:
            _discard(objects, store, manifest, unrecorded)
            manifest = None
        if manifest is not None and manifest.identity != identity:
            raise QkitError(
                f"{out} holds an interrupted run with {difference(manifest.identity, identity)}",
                "repeat that command to finish it, or discard it with --restart",
            )
        manifest = manifest or Manifest(dict(identity))
        if manifest.files:
            _forget_damaged(store, manifest)
        kept = KeptBack(store, LAST, lease)
        manifest.complete = False
        manifest.save(kept)
        yield RemoteWorkspace(out, kept, manifest)
    finally:
        lease.release()


def _check_ours(objects: Objects, expected: frozenset[str]) -> tuple[Manifest | None, list[str]]:
    """(the manifest that lies there, our files that it does not list). Raises QkitError for what is not ours."""
    names = {found.name for found in _everything(objects)} - {LOCK, MANIFEST}
    manifest = Manifest.find(RemoteStore(objects))
    unrecorded = sorted(names - manifest.files.keys()) if manifest else sorted(names)
    strangers = [name for name in unrecorded if manifest is None or not is_ours(name, expected)]
    if strangers:
        raise QkitError(
            f"{objects.label} holds {strangers[0]!r}, which qkit did not write",
            "move it away, or choose another prefix with -o",
        )
    return manifest, unrecorded


def _discard(objects: Objects, store: RemoteStore, manifest: Manifest, unrecorded: Iterable[str]) -> None:
    """Delete what an earlier run of ours left, whose manifest says from the start that it is no longer whole."""
    manifest.complete = False
    manifest.save(store)
    files = {*manifest.files, *unrecorded}
    for name in [*(n for n in LAST if n in files), *sorted(files - set(LAST)), MANIFEST]:
        persist(f"delete {objects.label}/{name}", lambda name=name: objects.delete(name))  # type: ignore[misc]


def _forget_damaged(store: RemoteStore, manifest: Manifest) -> None:
    """Files of an earlier run count only where their bytes are those that were noted."""
    notify(f"resuming: reading what lies at {store.label}")
    for name, entry in list(manifest.files.items()):
        if not store.has(name) or hash_file(store, name).sha256 != entry["sha256"]:
            del manifest.files[name]
