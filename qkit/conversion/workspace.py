"""The folder of the work in progress beside OUT, and how it becomes OUT: nothing that qkit did not write is touched."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import QkitError
from ..storage import journal
from ..storage.files import os_error
from ..storage.journal import JOURNAL
from ..storage.local import TEMPORARY_SUFFIX, LocalStore, fsync_folder, remove_temporaries, write_all
from ..storage.manifest import MANIFEST, NOTED, Manifest
from ..storage.store import FileDigest, hash_file
from ..untrusted import parse_json

# Held by the system's lock while a run writes, and moved with the folder: only after the last rename is it removed.
# Empty, but while an earlier result is being replaced: then it says where that is (`Workspace.publish`).
LOCK = ".qkit-lock"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def partial_dir(out: Path) -> Path:
    """Where the work in progress lives: beside OUT, on the same disk, so that the last step is one rename."""
    return out.with_name(out.name + ".qkit-partial")


def resolve_out(out: str | os.PathLike[str], inputs: Iterable[str | None] = ()) -> Path:
    """The absolute path of the folder that the result becomes.

    inputs: what the run reads (source, adapter, calibration file), as the user named them; those that are no paths
    here do not count. Raises QkitError, with a hint, for a place that a rename cannot fill, or where the result and
    an input would be one inside the other.
    """
    text = os.fspath(out)
    hint = "choose another folder with -o: one that does not exist yet"
    if not text or "\0" in text:
        raise QkitError(f"{text!r} is not a name for the output folder", hint)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition(os.sep)[0][1:]
        raise QkitError(f"{text}: there is no user {user!r}", f"for a folder of that name write ./{text}")
    path = Path(os.path.abspath(expanded))
    if not path.name:
        raise QkitError(f"the output cannot be {path}", hint)
    if len(os.fsencode(partial_dir(path).name)) > 255 - 24:  # what stands beside it has a longer name
        raise QkitError(f"the name of the output folder is too long: {path.name[:60]}...", hint)
    if path.is_symlink():
        target = "a folder" if path.is_dir() else "something that is not there" if not path.exists() else "a file"
        raise QkitError(f"{path} is a link to {target}, which the result would replace", hint)
    place = Path(os.path.realpath(path.parent)) / path.name
    here = Path(os.path.realpath(os.curdir))
    if place == here or place in here.parents:
        raise QkitError(f"{path} is the current folder, or holds it", hint)
    if os.path.ismount(path):
        raise QkitError(
            f"{path} is a mount point, which cannot be renamed over", f"use a folder inside it: -o {path}/model"
        )
    if path.exists() and not path.is_dir():
        raise QkitError(f"{path} exists and is not a folder", hint)
    for given in inputs:
        _check_apart(path, place, given)
    return path


def _check_apart(out: Path, place: Path, given: str | None) -> None:
    """Refuse where OUT, or the folder of the work in progress, is an input, holds one, or lies inside one."""
    if not given:
        return
    with suppress(OSError, ValueError):
        named = os.path.expanduser(given)
        if not os.path.lexists(named):
            return
        read = Path(os.path.realpath(named))
        for mine in (place, partial_dir(place)):
            if mine == read or mine in read.parents or read in mine.parents:
                raise QkitError(
                    f"the output {out} and the input {given} are one inside the other",
                    "choose a folder beside the input with -o: nothing of the input's is ever overwritten",
                )


# What lies in a folder: relative name -> (bytes, mtime in ns, inode).
Seen = Mapping[str, tuple[int, int, int]]


def look(out: Path) -> Seen:
    """What lies at `out` now; nothing for a folder that is absent or empty."""
    files = {}
    if out.is_dir():
        for path in sorted(out.rglob("*")):
            if path.is_symlink() or not path.is_dir():
                stat = path.lstat()
                files[str(path.relative_to(out))] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return files


def finished(out: Path, identity: Mapping[str, Any], restart: bool) -> Manifest | None:
    """The manifest of a finished, identical conversion at `out`; None where `out` is free or may be replaced.

    Raises QkitError for whatever else is there, strangers' files beside our own with `restart` included."""
    with _system_errors("read", out):
        if not out.exists() or not any(out.iterdir()):
            return None
    manifest = Manifest.find(out)
    if manifest is None:
        raise QkitError(f"{out} exists and was not written by qkit", "choose another folder with -o")
    if restart:
        strangers = sorted(look(out).keys() - manifest.files.keys() - {MANIFEST})
        if strangers:
            raise QkitError(
                f"{out} holds {strangers[0]!r}, which qkit did not write, so it is not replaced",
                "move that file away, or choose another folder with -o",
            )
        return None
    if manifest.complete and manifest.identity == identity:
        return manifest
    raise QkitError(f"{out} holds another conversion", "choose another folder with -o, or replace it with --restart")


def settle(out: Path) -> None:
    """Finish what a run left that was killed while it gave its folder the final name: an earlier result that it had
    moved aside goes back where nothing took its place, else away; so does the lock. Nothing while a run is at work."""
    for folder in (partial_dir(out), out):
        if not os.path.lexists(folder / LOCK):
            continue
        with _system_errors("open", folder), open(folder / LOCK, "r+") as lock:
            if not _locked(lock):
                return
            moved = _moved(lock, out)
            if moved is not None and not os.path.lexists(out):
                os.rename(moved[0], out)
            elif folder == out and Manifest.find(out) is not None:
                if moved is not None:
                    _remove_seen(*moved)
                (folder / LOCK).unlink()


def _moved(lock: IO[str], out: Path) -> tuple[Path, Seen] | None:
    """The earlier result that a lock tells of, where it still is, and what it consists of."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        told = parse_json(lock.read())
        aside = out.with_name(told["aside"])
        return (aside, {name: tuple(stamp) for name, stamp in told["seen"].items()}) if aside.is_dir() else None
    return None


@dataclass(frozen=True)
class _Held(LocalStore):
    """The folder, written to only while it is the one that was locked: after it was removed, another run may have made
    one of the same name."""

    lock: IO[str]

    def check(self) -> None:
        """Raises QkitError where the folder is another one, or gone."""
        if not _is_at(self.lock, self.folder / LOCK):
            raise QkitError(
                f"{self.folder} was removed or replaced during the run",
                "leave it alone, and run the same command again: it writes anew what is missing",
            )

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        self.check()
        return super().write(name, chunks)


class Workspace:
    """The locked folder of one run and its manifest. Use `open_workspace`.

    inherited  files that earlier runs finished"""

    def __init__(self, out: Path, folder: Path, manifest: Manifest, seen: Seen, lock: IO[str]):
        self.out, self.folder, self.manifest, self.seen, self.lock = out, folder, manifest, seen, lock
        self.inherited = frozenset(manifest.files)
        self.store = _Held(folder, lock)
        self.label = str(folder)
        self.scratch: Path | None = folder

    def has(self, file: str) -> bool:
        """Whether `file` is finished. What an earlier run wrote is hashed before it is counted on."""
        entry = self.manifest.files.get(file)
        return entry is not None and (self.folder / file).is_file()

    def note(self, **new: Mapping[str, Any]) -> None:
        """Add to the manifest what is finished; it stays so whatever happens next."""
        self.store.check()
        self.manifest.add(**new)
        journal.append(self.folder, {**{key: {} for key in NOTED}, **new})

    def save(self) -> None:
        """Write the manifest whole, and drop the journal. Stopped in between, the journal repeats what is there."""
        self.manifest.save(self.store)
        with _system_errors("write", self.folder / JOURNAL):
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def drop(self, files: Iterable[str]) -> None:
        """Forget finished files that turned out to be damaged: the same command writes them again."""
        self.manifest.forget(files)
        self.save()

    def reveal(self) -> None:
        """Nothing: the folder has no name yet that anybody looks for."""

    def publish(self) -> None:
        """Give the finished folder its final name: one rename, over nothing or over what was seen at the start.

        Raises QkitError where something else lies there by now: the finished result stays where it is, and the same
        command, once the place is free, only renames it. What a kill leaves half-done here, `settle` ends."""
        self.store.check()
        aside = None
        if self.seen and self.out.exists():
            if look(self.out) != self.seen:
                raise self._occupied()
            aside = self.out.with_name(f"{self.out.name}.qkit-old-{secrets.token_hex(4)}")
        try:
            if aside is not None:
                with _system_errors("write", self.folder / LOCK):
                    write_all(self.lock.fileno(), json.dumps({"aside": aside.name, "seen": self.seen}).encode())
                    os.fsync(self.lock.fileno())
                os.rename(self.out, aside)
            # On every POSIX system a folder's rename fails over a file, a link or a folder with anything in it.
            os.rename(self.folder, self.out)
        except BaseException as error:
            occupied = os.path.lexists(self.out)
            if aside is not None and not occupied:
                with suppress(OSError):  # `settle` tries again
                    os.rename(aside, self.out)
            if not isinstance(error, OSError):
                raise
            raise (self._occupied() if occupied else os_error("rename", self.out, error)) from error
        with _system_errors("write", self.out):
            fsync_folder(self.out.parent)
            if aside is not None:
                _remove_seen(aside, self.seen)
            (self.out / LOCK).unlink()

    def _occupied(self) -> QkitError:
        return QkitError(
            f"something appeared at {self.out} during the run and is left alone; the result is in {self.folder}",
            "move away what is there and run the same command again: it only gives the result its name",
        )


def _remove_seen(folder: Path, seen: Seen) -> None:
    """Remove an earlier result of ours, now aside, file by file: whatever was not seen at the start stays."""
    now = look(folder)
    for name, stamp in seen.items():
        if now.get(name) == stamp:
            (folder / name).unlink(missing_ok=True)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        with suppress(OSError):  # not empty
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def open_workspace(
    out: Path, identity: Mapping[str, Any], expected: Iterable[str], restart: bool = False
) -> Iterator[Workspace]:
    """Lock the folder beside `out`, or make it; with `restart` discard what an earlier run left in it. `settle` and
    `finished` come first.

    expected: the files that the run will write: a killed run may have left one that its manifest does not list yet.
    Raises QkitError where another run holds it, where it belongs to another conversion, holds strangers' files, or
    where a folder beside `out` cannot be renamed."""
    folder = partial_dir(out)
    if folder.is_symlink():
        raise QkitError(f"{folder} is a link", "move it away, or choose another folder with -o")
    with _system_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115  # held until the run ends
    with lock:
        if not _locked(lock) or not _is_at(lock, folder / LOCK):
            raise QkitError(f"another qkit convert is writing {out}", "wait for it, or choose another folder with -o")
        with _system_errors("write", folder):
            seen: Seen = look(out)
            if seen and not restart:  # another run has finished since `finished` looked
                (folder / LOCK).unlink()
                with suppress(OSError):  # not empty
                    folder.rmdir()
                raise QkitError(f"something appeared at {out} just now", "run the same command again")
            lock.truncate(0)
            _probe_rename(out)
            manifest = _manifest(folder, identity, frozenset(expected), restart)
            remove_temporaries(folder)
            _forget_damaged(folder, manifest)
            work = Workspace(out, folder, manifest, seen, lock)
            work.save()
        yield work


def _manifest(folder: Path, identity: Mapping[str, Any], expected: frozenset[str], restart: bool) -> Manifest:
    """The manifest to go on from: the one in `folder`, or a new one. Only files of ours are discarded."""
    found = Manifest.find(folder)
    ours, manifest = found is not None, found or Manifest(dict(identity))
    known = {*manifest.files, MANIFEST, JOURNAL, LOCK}
    unrecorded = [n for n in look(folder) if n not in known and not n.endswith(TEMPORARY_SUFFIX)]
    strangers = [n for n in unrecorded if not (ours and is_ours(n, expected))]
    if strangers:
        raise QkitError(f"{folder} holds files that are not qkit's ({strangers[0]})", "move them away")
    if restart and ours:
        for name in (JOURNAL, *manifest.files, *unrecorded):  # the journal first: it must not add to a new manifest
            (folder / name).unlink(missing_ok=True)
        return Manifest(dict(identity))
    if ours and manifest.identity != identity:
        raise QkitError(
            f"{folder} holds an interrupted run with {difference(manifest.identity, identity)}",
            "repeat that command to finish it, or discard it with --restart",
        )
    return manifest


def is_ours(name: str, expected: frozenset[str]) -> bool:
    """Whether a file beside a manifest of ours, which does not list it, is one that a killed run wrote last."""
    return name in expected or _SHARD.fullmatch(name) is not None


def _forget_damaged(folder: Path, manifest: Manifest) -> None:
    """Files of an earlier run count only where their bytes are those that were noted."""
    for name, entry in list(manifest.files.items()):
        if not (folder / name).is_file() or hash_file(LocalStore(folder), name).sha256 != entry["sha256"]:
            del manifest.files[name]
            manifest.complete = False


def _probe_rename(out: Path) -> None:
    """Whether a folder beside `out` can be renamed: better known now than after hours."""
    name = f".{out.name[:200]}.qkit-probe-"
    for left in out.parent.glob(glob.escape(name) + "*"):  # by a run that was killed here
        with suppress(OSError):  # not empty, so none of ours
            left.rmdir()
    one = out.with_name(name + secrets.token_hex(4))
    two = one.with_name(one.name + "2")
    with _system_errors("rename a folder beside", out):
        one.mkdir()
        try:
            os.rename(one, two)
        except OSError:
            one.rmdir()
            raise
        two.rmdir()


@contextmanager
def _system_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_error(action, path, error) from error


def _is_at(handle: IO[str], path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _locked(handle: IO[str]) -> bool:
    """Whether this process now holds the lock; released by the system however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two runs at once are the user's risk there
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as Windows
        return True
    return True


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    key = next((k for k in new if old.get(k) != new.get(k)), "version")
    if key == "source":
        return "another source"
    before = old.get(key)
    return f"another {key}" + (f" ({json.dumps(before)})" if isinstance(before, str | bool | int) else "")
