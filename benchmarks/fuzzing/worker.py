"""The process of one target: mutates, runs, tells what came of it, and keeps what should not have come."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from .mutate import Case, mutated, places
from .targets import TARGETS, Target

CPU_SECONDS = 5
MEMORY = 512 << 20  # bytes beside what the process has once every seed was run
_MOST_CASES = 600
_LONGEST = 100_000  # characters of a message


class TooSlow(BaseException):
    """Not an Exception: what is caught for any error must not hide it."""


def run(name: str, seconds: float, seed: int, work: Path) -> None:
    target, rng = TARGETS[name], Random(f"{seed}/{name}")
    until = time.monotonic() + seconds
    place = work / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    corpus = target.seeds(place / "seeds")
    pool = _pool(corpus)
    signal.signal(signal.SIGPROF, _too_slow)
    known: set[tuple[Any, ...]] = set()
    for case in corpus:
        outcome, problem = attempt(target, case, place / "case")
        if wrong(problem) is not None:
            traceback.print_exception(problem)
            raise SystemExit(f"a seed of {name} leads to a find")
        if problem is not None:
            print(f"a seed is refused: {problem}", file=sys.stderr)
        known.add(outcome)
    if not any(outcome[0] == "read" for outcome in known):
        raise SystemExit(f"no seed of {name} is read")
    seeds, runs, finds = len(corpus), 0, 0
    _limit()
    while time.monotonic() < until:
        of = corpus[rng.randrange(seeds)] if rng.random() < 0.5 else rng.choice(corpus)
        names = [n for n in of if not target.only or n.endswith(target.only)]
        if not of:
            continue
        case = mutated(of, rng, pool, names or list(of), target.places)
        outcome, problem = attempt(target, case, place / "case")
        runs += 1
        why = wrong(problem)
        if why is not None and (why, *outcome) not in known:
            known.add((why, *outcome))
            finds += 1
            _keep(work, name, why, case, problem, finds)
        elif why is None and outcome not in known:
            known.add(outcome)
            corpus.append(case)
            if len(corpus) > _MOST_CASES + seeds:
                del corpus[rng.randrange(seeds, len(corpus))]
        if runs % 20 == 1 or why is not None:
            (work / f"{name}.state").write_text(json.dumps({"runs": runs, "paths": len(known)}))
        if runs % 500 == 0:
            _limit()
    (work / f"{name}.state").write_text(json.dumps({"runs": runs, "paths": len(known)}))


def _qkit_error() -> type[Exception]:
    from qkit.errors import QkitError

    return QkitError


def _pool(corpus: list[Case]) -> list[tuple[str, Any]]:
    """Keys and values of all documents of the seeds."""
    found: dict[str, tuple[str, Any]] = {}
    for case in corpus:
        for name, content in case.items():
            if name.endswith(".json") and isinstance(content, bytes) and len(content) < 50_000:
                for owner, key in places(json.loads(content)):
                    if isinstance(owner, dict) and len(key) < 60:
                        found.setdefault(f"{key} {str(owner[key])[:40]}", (key, owner[key]))
    return list(found.values())


def write_case(case: Case, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "dir":
            path.mkdir()
        else:
            path.symlink_to(content.removeprefix("link:"))


def attempt(target: Target, case: Case, folder: Path) -> tuple[tuple[Any, ...], BaseException | None]:
    """(what tells this outcome from others, what was raised)."""
    write_case(case, folder)
    problem: BaseException | None = None
    said: Any = None
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        said = target.run(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        problem = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return _told(problem, said), problem


def _told(problem: BaseException | None, said: Any) -> tuple[Any, ...]:
    if problem is None:
        return ("read", str(said))
    frames = traceback.extract_tb(problem.__traceback__)
    if problem.__cause__ is not None:
        frames += traceback.extract_tb(problem.__cause__.__traceback__)
    ours = [
        f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/qkit/" in f.filename or "/kernels/" in f.filename
    ]
    return (type(problem).__name__, *(ours if isinstance(problem, _qkit_error()) else ours[-1:]))


def wrong(problem: BaseException | None) -> str | None:
    """Why an outcome is a find; None where it is right."""
    if problem is None:
        return None
    if not isinstance(problem, _qkit_error()):
        return type(problem).__name__
    shown = str(problem)
    if "no memory for" in shown:
        return "MemoryError"
    try:
        shown.encode("utf-8")
    except UnicodeEncodeError:
        return "unprintable"
    return "long" if len(shown) > _LONGEST else None


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {CPU_SECONDS} s")


def _limit() -> None:
    """Memory beside what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _keep(work: Path, name: str, why: str, case: Case, problem: BaseException | None, number: int) -> None:
    folder = work / "finds" / f"{name}-{why}-{number:03}"
    write_case(case, folder)
    with open(folder / "FIND.txt", "w", errors="backslashreplace") as file:
        traceback.print_exception(problem, file=file)


def replay(target: Target, folder: Path) -> int:
    try:
        target.run(folder)
    except Exception as error:
        traceback.print_exception(error)
        return 1 if wrong(error) else 0
    print("read", file=sys.stderr)
    return 0
