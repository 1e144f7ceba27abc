"""A pool of processes on any machines: what driver and workers of a conversion agree on."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import units
from ..errors import QkitError
from ..sources import DEMO, open_source
from ..storage.places import parse_place, scheme_of
from .options import Options
from .plan import Plan, make_plan

RESTARTS = 3  # of a block of which the cluster lost something for good


@dataclass(frozen=True)
class Node:
    """What a machine offers to tasks: cores, and bytes of memory."""

    cpus: int
    memory: int


class Pool(Protocol):
    """Processes on any machines, to which functions are sent by name and what they take and give pickled.

    What a process was doing when it died is done again by another one, a few times. What nobody waits for any more when
    the pool is given up may end unfinished."""

    def nodes(self) -> list[Node]:
        """The machines that take tasks now."""
        ...

    def submit(self, function: Callable[..., Any], *args: Any, cpus: int, memory: int) -> Any:
        """A ticket for function(*args), which gets `cpus` cores and may hold `memory` bytes. For a ticket among `args`
        it gets what that stands for."""
        ...

    def put(self, value: Any) -> Any:
        """A ticket for a value."""
        ...

    def wait(self, tickets: Collection[Any]) -> Any:
        """One of them that is done, as soon as there is one."""
        ...

    def result(self, ticket: Any) -> Any:
        """Raises QkitError where whoever computes it keeps dying, Lost where it, or what it is made of, is gone."""
        ...


@dataclass(frozen=True)
class Job:
    """From what a worker makes the plan, and what has to agree with the driver's. Paths are absolute.

    token    a file that the driver put into the folder of the work in progress
    largest  what the driver observed of the KV cache: name of a scale -> magnitude
    shape    [samples, length] of the calibration text
    threads  of the driver's operations where it calibrates: how they divide the work may decide bits"""

    source: str
    out: str
    options: Options
    version: str
    fingerprint: str
    plan: str
    token: str = ""
    largest: tuple[tuple[str, float], ...] = ()
    shape: tuple[int, int] = (0, 0)
    threads: int = 0


@dataclass(frozen=True)
class Refused:
    """A QkitError, on its way to the driver."""

    message: str
    hint: str | None


class Lost(QkitError):
    """What was there already is gone, with the machines that had it."""


def job_of(source: str, options: Options, plan: Plan) -> Job:
    """source, options: as the user gave them; plan: what came of them here."""
    from .. import __version__

    places: dict[str, Any] = {name: _absolute(getattr(options, name)) for name in ("recipe", "fit", "calib", "lora")}
    # The driver runs the model where it has to run: a worker counts on no device and on next to no memory for that.
    there = replace(options, **places, ray=None, device="cpu", restart=False, calib_samples=1, calib_len=16)
    spec = source if source == DEMO else _absolute(source) or source
    return Job(spec, str(plan.out), there, __version__, plan.original.fingerprint, digest_of(plan))


def _absolute(given: str | None) -> str | None:
    """A path here as another machine can take it; whatever else was named as it is."""
    if given is None or not os.path.lexists(os.path.expanduser(given)):
        return given
    return os.path.abspath(os.path.expanduser(given))


def digest_of(plan: Plan) -> str:
    """Of all that decides the bytes of a plan's files."""
    decided = (plan.fmt.name, plan.name, plan.method.name, plan.recipe.as_list(), plan.shards)
    return hashlib.sha256(repr(decided).encode()).hexdigest()


def accepted(answer: Any) -> Any:
    if isinstance(answer, Refused):
        raise QkitError(answer.message, answer.hint)
    return answer


def machines(pool: Pool) -> list[Node]:
    """Those that take tasks. Raises QkitError where there are none."""
    nodes = [node for node in pool.nodes() if node.cpus]
    if not nodes:
        raise QkitError("no machine of the cluster offers a core to tasks", "start workers, or drop --ray")
    return nodes


def check_fits(needed: int, nodes: list[Node]) -> None:
    """Raises QkitError where no machine has so many bytes: tasks would wait for ever."""
    most = max(node.memory for node in nodes)
    if needed > most:
        raise QkitError(
            f"a worker needs {units.size(needed)} of memory (predicted), and the largest machine of the cluster "
            f"offers {units.size(most)} to tasks",
            "start a larger one, or say what a machine has: ray start --memory BYTES",
        )


# What follows runs in a worker.


def compute_on(threads: int) -> None:
    """Let each of torch's and the kernels' operations use so many threads: a task has the cores that it was given."""
    import torch

    torch.set_num_threads(threads)


def plan_of(job: Job) -> Plan:
    """The driver's plan, made here. Raises QkitError where it is not."""
    try:
        plan = _made(replace(job, token="", largest=(), shape=(0, 0), threads=0))
    except QkitError as error:
        raise QkitError(f"on {socket.gethostname()}: {error.message}", error.hint) from error
    if plan.cache is not None:
        plan.cache.largest = dict(job.largest)
    return plan


@functools.lru_cache(maxsize=1)
def _made(job: Job) -> Plan:
    """Once for all tasks that a process gets."""
    from .. import __version__

    if __version__ != job.version:
        raise QkitError(
            f"qkit is {__version__}, and {job.version} where the run began", "install one version everywhere"
        )
    same = "all machines need the same source under the same name: on a file system that they share, or from the Hub"
    try:
        source = open_source(job.source, lora=job.options.lora)
    except QkitError as error:
        raise QkitError(error.message, same) from error
    plan = make_plan(source, Path(job.out) if scheme_of(job.out) is None else parse_place(job.out), job.options)
    if plan.original.fingerprint != job.fingerprint:
        raise QkitError(f"{job.source} is another checkpoint than where the run began", same)
    if digest_of(plan) != job.plan:
        raise QkitError(
            "the same options give another plan than where the run began",
            "install the same versions of qkit, torch and transformers everywhere",
        )
    return plan
