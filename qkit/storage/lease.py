"""One writer at a time below a prefix of an object store, where no system releases the lock of a process that is gone.

The lock is an object, made where there is none, and written anew every few seconds while its run lives. One that stays
the same for longer belongs to a run that is gone, and is taken over: no clock is compared, and no file is lost.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..errors import QkitError
from ..untrusted import parse_json
from .remote import Objects, RemoteStore, persist
from .store import read_file

LOCK = ".qkit-lock"
BEAT = 15.0  # seconds between two writings
LEASE = 90.0  # seconds without one after which its run counts as gone
_POLL = 5.0


class Lease:
    """Holds the lock below `objects` from its making until `release`.

    say: called with what a user should know while it waits. Raises QkitError where another run holds it."""

    def __init__(self, objects: Objects, say: Callable[[str], None]):
        self._objects, self._name = objects, f"{objects.label}/{LOCK}"
        self._run, self._beats = secrets.token_hex(8), 0
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._tag = self._put(None) or self._taken_over(say)
        self._thread = threading.Thread(target=self._beat, name="qkit-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises QkitError where another run has taken the lock: this one was taken for gone."""
        if self._lost.is_set():
            raise QkitError(
                f"another run took over {self._objects.label}: nothing was heard of this one for {LEASE:.0f} seconds",
                "leave it to the other run",
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        with suppress(QkitError):  # what is left of it is taken over by the next run
            if self._seen() == self._tag:
                persist(f"delete {self._name}", lambda: self._objects.delete(LOCK))

    def _put(self, tag: str | None) -> str | None:
        """The lock's new tag where it had `tag`, or was not there; None where another run has it."""
        self._beats += 1
        text = {"run": self._run, "beat": self._beats, "host": platform.node(), "process": os.getpid()}
        data = json.dumps(text).encode()
        done = persist(f"write {self._name}", lambda: self._objects.put_if(LOCK, data, tag))
        if done is None and self._content() == data:  # written by a try whose answer was lost
            return self._seen()
        return done

    def _seen(self) -> str | None:
        found = persist(f"look at {self._name}", lambda: self._objects.find(LOCK))
        return found.tag if found else None

    def _content(self) -> bytes:
        with suppress(QkitError):  # gone, or written anew between the two
            return read_file(RemoteStore(self._objects), LOCK)
        return b""

    def _taken_over(self, say: Callable[[str], None]) -> str:
        """The tag of the lock once the run that left it is known to be gone."""
        before, since, told = self._seen(), time.monotonic(), False
        while before is not None and time.monotonic() - since < LEASE:
            if not told:
                say(f"a lock lies at {self._name}: waiting {LEASE:.0f} seconds to see whether its run is alive")
                told = True
            time.sleep(min(_POLL, LEASE / 4))
            now = self._seen()
            if now is None:
                break
            if now != before:
                raise self._held()
        tag = self._put(before if self._seen() is not None else None)
        if tag is None:
            raise self._held()
        return tag

    def _held(self) -> QkitError:
        who = ""
        with suppress(ValueError, KeyError, TypeError):
            holder = parse_json(self._content())
            who = f" (process {holder['process']} on {holder['host']})"
        return QkitError(
            f"another qkit convert is writing {self._objects.label}{who}",
            "wait for it, or choose another place with -o",
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                tag = self._put(self._tag)
            except QkitError:  # the network is gone: the next beat tells whether the lock is still ours
                continue
            if tag is None:
                self._lost.set()
                return
            self._tag = tag
