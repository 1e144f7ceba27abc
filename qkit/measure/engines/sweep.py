"""One model through one engine's points, in a process that is the engine's alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Queue
from typing import IO, Any

from ..footprint import ending, own_environment
from . import table
from .types import Point, Sweep, measured_point

REPEATS = 3
BUDGET = 120.0  # seconds that a point may take, by what is known of it when it begins
LOADING = 1800.0  # seconds until an engine has to be ready
_LOOK = 0.5  # seconds between looks at whether the process lives
_OVER = 3.0  # a point that takes this many times its budget is ended, and the process with it
# Cores, paths and libraries are chosen for the Python that they are set for; another one finds its own.
_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def sweep(
    model: str,
    engine: str,
    points: Sequence[Point],
    tokens: Sequence[int],
    *,
    device: str = "cpu",
    python: str | None = None,
    repeats: int = REPEATS,
    budget: float = BUDGET,
    cache_bytes: int = 0,
    arguments: dict[str, Any] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Sweep:
    """Measure the points of a plan. A point that fails is skipped with the engine's words; where the process ends
    (killed, out of memory, crashed, over its time), so are those after it, and `Sweep.problem` says why.

    model        what the user names; see `table.Engine.place`
    tokens       ids of text, at least as many as the longest prompt; repeated where they are fewer
    python       the Python that has the engine; default: this one
    cache_bytes  what the largest point's KV cache takes, for an engine that reserves it (vLLM on a CPU)
    arguments    more of the engine's own (vLLM: of the class LLM)
    progress(1)  after each point
    Raises QkitError where the engine is not there or does not run such a model.
    """
    kind = table.get(engine)
    place = kind.place(model)
    command = table.python_with(kind, python)
    wanted = [i for i, point in enumerate(points) if point.skipped is None]
    skipped = len(points) - len(wanted)
    if progress and skipped:
        progress(skipped)
    if not wanted:
        return Sweep(engine, "", model, {}, tuple(points))
    longest = max(points[i].prompt for i in wanted)
    request = {
        "adapter": str(table.ADAPTERS / kind.adapter),
        "settings": {
            "model": place,
            "device": device,
            "threads": _threads(),
            "max_context": max(points[i].prompt + points[i].generated for i in wanted),
            "max_batch": max(points[i].batch for i in wanted),
            "generated": max(points[i].generated for i in wanted),
            # A quarter more, and some blocks: caches are paged.
            "cache_bytes": cache_bytes + cache_bytes // 4 + (64 << 20),
            "arguments": arguments or {},
        },
        "tokens": [tokens[i % len(tokens)] for i in range(longest)],
        "points": [
            {name: getattr(points[i], name) for name in ("batch", "context", "prompt", "generated")} for i in wanted
        ],
        "repeats": repeats,
        "budget": budget,
    }
    found, facts, problem = _run(command, request, _environment(kind, device), progress or (lambda amount: None))
    reached = {wanted[i]: answer for i, answer in found.items()}
    done = tuple(
        point if point.skipped is not None else _point(point, reached.get(i), problem) for i, point in enumerate(points)
    )
    return Sweep(engine, facts.get("version", ""), model, facts.get("settings", {}), done, problem)


def _point(plan: Point, answer: dict[str, Any] | None, problem: str | None) -> Point:
    if answer is None:
        return replace(plan, skipped=f"not reached: {problem}")
    if "skipped" in answer:
        return replace(plan, skipped=str(answer["skipped"]))
    figures = ("warmups", "ttft", "tpot", "generate", "peak_bytes")
    return measured_point(plan, **{name: answer[name] for name in figures})


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _environment(kind: table.Engine, device: str) -> dict[str, str]:
    if kind.package is None:
        return own_environment()
    env = {name: value for name, value in os.environ.items() if name not in _OWN}
    index = device.partition(":")[2]
    if index:
        seen = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        env["CUDA_VISIBLE_DEVICES"] = seen[int(index)] if int(index) < len(seen) and seen[0] else index
    return env


def _run(
    python: str, request: dict[str, Any], env: dict[str, str], progress: Callable[[float], None]
) -> tuple[dict[int, dict[str, Any]], dict[str, Any], str | None]:
    """(answer of each point that gave one, what the engine says of itself, why the process ended early or None)."""
    found: dict[int, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        try:
            # A session of its own: whatever processes the engine starts end with it.
            process = subprocess.Popen(
                [python, str(table.ADAPTERS / "sweep_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            return found, facts, f"no process could be started: {error.strerror or error}"
        try:
            problem = _listen(process, request, found, facts, progress)
            if problem is None and len(found) < len(request["points"]):
                problem = ending(process.wait(), _last(stderr))
        finally:
            _end(process)
    return found, facts, problem


def _listen(
    process: subprocess.Popen[str],
    request: dict[str, Any],
    found: dict[int, dict[str, Any]],
    facts: dict[str, Any],
    progress: Callable[[float], None],
) -> str | None:
    """Take the process's answers until it ends; why they cannot go on, or None where it ended of itself."""
    answers: Queue[dict[str, Any] | None] = Queue()
    threading.Thread(target=_read, args=(process, request, answers), daemon=True).start()
    limit = LOADING
    deadline = time.monotonic() + limit
    while True:
        # Looked at before the queue: what it said until it ended is there then, though others may hold its pipe open.
        ended = process.poll() is not None
        try:
            answer = answers.get(timeout=_LOOK)
        except Empty:
            if ended:
                return None
            if time.monotonic() > deadline:
                return f"its process was ended after {limit:.0f} s without an answer"
            continue
        if answer is None:
            return None
        if "problem" in answer:
            return str(answer["problem"])
        if "ready" in answer:
            facts.update(answer["ready"])
        if "point" in answer:
            found[int(answer["point"])] = answer
            progress(1)
        limit = _OVER * float(request["budget"])
        deadline = time.monotonic() + limit
        if len(found) == len(request["points"]):
            return None


def _read(process: subprocess.Popen[str], request: dict[str, Any], answers: Queue[dict[str, Any] | None]) -> None:
    """Hand the request over, and every line that is an answer; None at the end."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # it died before it read all of it: its ending says why
        process.stdin.write(json.dumps(request))
        process.stdin.close()
    for line in process.stdout:
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                answers.put(answer)
    answers.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _last(stderr: IO[str]) -> str:
    """The end of what it said."""
    stderr.flush()
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - 20000))
    return stderr.read()
