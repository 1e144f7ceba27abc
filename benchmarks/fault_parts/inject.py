"""A conversion in a forked process in which one thing goes wrong.

Everything that a conversion does to the disk goes through a few functions of `os`. In the child they are wrapped: calls
that concern files below one folder are counted, and at the n-th of them the process is killed, interrupted, or told
that the system refuses. Steps of the work (a task, a matrix of a block) are counted too, for workers that die.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = ("write", "fsync", "replace", "rename", "mkdir", "open")  # a system may refuse these
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
REMOVALS = ("unlink", "rmdir")
COUNTED = (*WRITES, *REMOVALS, "preadv")
DEATHS: dict[str, Callable[[], BaseException]] = {
    "MemoryError": MemoryError,
    "RuntimeError": lambda: RuntimeError("a worker died"),
    "OSError": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when.

    kind    SIGKILL, SIGTERM or SIGINT; ENOSPC, EIO, ...: an error of the system; short: a write of half its
            bytes; torn: that, and a kill; a name of DEATHS: an exception in a worker
    at      the operation that is counted ("write", "any", "step"), or "time"
    nth     of those operations, from 1; or milliseconds
    lasts   an error of the system: from then on, as on a full disk
    late    a signal: after the operation, not before it
    """

    kind: str
    at: str = "any"
    nth: int = 1
    lasts: bool = False
    late: bool = False

    @property
    def is_signal(self) -> bool:
        return self.kind in SIGNALS


class Injector:
    """Counts operations below `root`, and lets `fault` happen once its turn comes. note: a file that then exists."""

    def __init__(self, root: Path, fault: Fault | None, note: Path):
        self.root, self.fault, self.note = str(root) + os.sep, fault, note
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.real = {name: getattr(os, name) for name in COUNTED}

    def install(self) -> None:
        from qkit.calibrate.block import Block
        from qkit.conversion.execute import Produce

        for name in COUNTED:
            setattr(os, name, self._wrapped(name))
        for owner, method in ((Produce, "__call__"), (Block, "quantize")):
            setattr(owner, method, self._stepped(getattr(owner, method)))

    def _below(self, place: Any) -> bool:
        """place: a path or a descriptor."""
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
        return path.startswith(self.root)

    def _turn(self, name: str) -> bool:
        """Whether it is this operation that the fault hits."""
        with self.lock:
            self.counts[name] += 1
            if name != "step":
                self.counts["any"] += 1
            fault = self.fault
            if fault is None or fault.at not in (name, "any" if name != "step" else name):
                return False
            count = self.counts[fault.at]
            hit = count == fault.nth or (fault.lasts and count > fault.nth)
            if hit:
                os.close(self.real["open"](self.note, os.O_CREAT | os.O_WRONLY))
            return hit

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            writes = name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR)
            if not writes or not self._below(args[0]) or not self._turn(name):
                return real(*args, **kwargs)
            assert self.fault is not None
            kind = self.fault.kind
            if self.fault.is_signal:
                if not self.fault.late:
                    self._signal()
                done = real(*args, **kwargs)
                if self.fault.late:
                    self._signal()
                return done
            if kind in ("short", "torn") and name == "write":
                done = real(args[0], args[1][: max(1, len(args[1]) // 2)])
                if kind == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)
                return done
            number = getattr(errno, kind)
            if name == "write" and number == errno.ENOSPC:  # a full disk takes what there is room for
                real(args[0], args[1][: len(args[1]) // 3])
            raise OSError(number, os.strerror(number), args[0] if isinstance(args[0], str) else None)

        return call

    def _signal(self) -> None:
        assert self.fault is not None
        os.kill(os.getpid(), getattr(signal, self.fault.kind))

    def _stepped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._turn("step"):
                assert self.fault is not None
                raise DEATHS[self.fault.kind]()
            return real(*args, **kwargs)

        return call


def start(argv: list[str], root: Path, fault: Fault | None, place: Path) -> int:
    """Fork a process that runs `qkit ARGV`; its id. root: whose files count; place: a folder for stdout, stderr,
    counts, the note that the fault happened, the traceback of an internal error."""
    for name in ("stdout", "stderr", "counts", "happened"):
        (place / name).unlink(missing_ok=True)
    (place / "stderr").touch()  # of a process that is killed before its first step too
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY), stream)
        os.environ["TMPDIR"] = str(place)
        code = _run(argv, Injector(root, fault, place / "happened"), place / "counts")
    except KeyboardInterrupt:  # before `main` was there to say so
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(argv: list[str], injector: Injector, counts: Path) -> int:
    import torch

    from qkit.cli import main

    torch.set_num_threads(1)
    injector.install()
    code = main(argv)
    for name, real in injector.real.items():
        setattr(os, name, real)
    counts.write_text(json.dumps({"counts": injector.counts, "modules": sorted(sys.modules)}))
    return code
