"""An executor on many machines: files, or the tensors of one file, are made by workers and noted by the driver.

A worker opens the same source, makes the same plan and writes into the same folder. What decides bytes is therefore
what decides them on one machine; driver and worker only agree that their plans are the same. What travels is small:
the job, a file's name, what the manifest is to say of it. Where there is one file to write, its quantized tensors
travel to the driver, which writes them in order.

Knows nothing of Ray: `ray_pool` is a `Pool`, and tests have one of processes that die.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import units
from ..errors import QkitError
from ..sources import DEMO, open_source
from ..storage.local import TEMPORARY_SUFFIX, LocalStore, remove_temporaries
from ..storage.places import parse_place, scheme_of
from .execute import Make, Written, make_shard, produce_of
from .executor import Threads
from .options import Options
from .output import remote_store
from .plan import Plan, make_plan
from .predict import worker_memory
from .produce import Job as Piece
from .produce import Part, Produce
from .tasks import Shard
from .wire import Wire

if TYPE_CHECKING:
    from ..calibrate.blocks import Elsewhere
    from ..calibrate.statistics import Moments
    from ..storage.store import Store

_SEEN = 5.0  # seconds until what one machine wrote has to be seen by another: network file systems remember for a while
RESTARTS = 3  # of a block of which the cluster lost something for good
_AHEAD = 2  # tensors on their way for each that can be computed at once


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


class Cluster:
    """An `Executor` on the workers of a pool."""

    def __init__(self, pool: Pool, job: Job, workers: int):
        """workers: threads of the driver, for what it does itself."""
        self.pool, self.job, self.workers = pool, job, workers

    def files(self, make: Callable[[Any], Any], shards: Sequence[Shard]) -> Iterator[tuple[Shard, Written]]:
        """Each file by a worker of its own. Of a single file the tensors are spread instead."""
        assert isinstance(make, Make)  # a worker has a source and a format of its own
        if len(shards) == 1:
            yield shards[0], make(shards[0])
            return
        produce, store = make.produce, make.store
        sent = LocalStore(store.folder) if isinstance(store, LocalStore) else None
        nodes = self.nodes()
        cpus = max(1, min(min(node.cpus for node in nodes), sum(node.cpus for node in nodes) // len(shards)))
        memory = self._fits(produce, shards, cpus, nodes)
        with _marked(store) as token:
            job = replace(self._told(produce), token=token)
            tickets = {
                self.pool.submit(write_file, job, sent, shard.file, cpus, cpus=cpus, memory=memory): shard
                for shard in shards
            }
            while tickets:
                ticket = self.pool.wait(tickets)
                written = accepted(self.pool.result(ticket))
                shard = tickets.pop(ticket)
                _await(store, shard.file)
                yield shard, written
                make.advance(shard.bytes_in)

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """Quantized parts by workers, a bounded number ahead; what passes through by the driver, as it is written."""
        if not isinstance(work, Produce) or work.block is not None:  # of which all is here
            yield from Threads(self.workers).run(work, tasks)
            return
        nodes, job = self.nodes(), self._told(work)
        ahead = _AHEAD * sum(node.cpus for node in nodes)
        pending: deque[tuple[Piece, Any]] = deque()

        def first() -> Part:
            piece, ticket = pending.popleft()
            return work(piece) if ticket is None else accepted(self.pool.result(ticket)).value

        for piece in tasks:
            if len(pending) >= ahead:
                yield first()
            ticket, task = None, piece.task
            if task.scheme is not None:
                memory = self._fits(work, [Shard("", (task,))], 1, nodes)
                seen = {piece.source: work.statistics[piece.source]} if piece.source in work.statistics else {}
                sent = replace(piece, read=None)
                ticket = self.pool.submit(make_part, job, sent, seen, cpus=1, memory=memory)
            pending.append((piece, ticket))
        while pending:
            yield first()

    def nodes(self) -> list[Node]:
        nodes = [node for node in self.pool.nodes() if node.cpus]
        if not nodes:
            raise QkitError("no machine of the cluster offers a core to tasks", "start workers, or drop --ray")
        return nodes

    def _fits(self, produce: Produce, shards: Sequence[Shard], workers: int, nodes: list[Node]) -> int:
        """The bytes that a worker is granted."""
        needed = worker_memory(produce.source, shards, produce.fmt, produce.method, workers)
        self.check_fits(needed, nodes)
        return needed

    def check_fits(self, needed: int, nodes: list[Node]) -> None:
        """Raises QkitError where no machine has so many bytes: tasks would wait for ever."""
        most = max(node.memory for node in nodes)
        if needed > most:
            raise QkitError(
                f"a worker needs {units.size(needed)} of memory (predicted), and the largest machine of the cluster "
                f"offers {units.size(most)} to tasks",
                "start a larger one, or say what a machine has: ray start --memory BYTES",
            )

    def apart(self, produce: Produce, shape: tuple[int, int]) -> Elsewhere:
        """Calibration by workers."""
        from .spread import Spread

        return Spread(self, produce, shape)

    def _told(self, produce: Produce) -> Job:
        """The job with what the driver alone has seen."""
        cache = produce.plan.cache
        return self.job if cache is None else replace(self.job, largest=tuple(cache.largest.items()))


class _marked:
    """While entered there is a file in a local store's folder by which workers know that it is the driver's, and that
    the driver is still at it; what killed workers left there goes in the end."""

    def __init__(self, store: Store):
        self.folder = store.folder if isinstance(store, LocalStore) else None  # what is no folder is one for all

    def __enter__(self) -> str:
        if self.folder is None:
            return ""
        token = self.folder / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        token.touch()
        return str(token)

    def __exit__(self, *exc: object) -> None:
        if self.folder is not None:
            remove_temporaries(self.folder)


def accepted(answer: Any) -> Any:
    if isinstance(answer, Refused):
        raise QkitError(answer.message, answer.hint)
    return answer


def _await(store: Store, file: str) -> None:
    """Raises QkitError where a file that a worker has written is not seen here."""
    if not _soon(lambda: store.has(file)):
        raise QkitError(
            f"a worker wrote {file}, and it is not in {store.label} here",
            "the folder of OUT has to lie on a file system that all machines share",
        )


def _soon(true: Callable[[], bool]) -> bool:
    """Whether it is `true` within a few seconds."""
    until = time.monotonic() + _SEEN
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


# What follows runs in a worker.


def write_file(job: Job, store: Store | None, file: str, cpus: int) -> Written | Refused:
    """Write one file of the plan on so many cores. store: None for an object store, of which OUT is the name."""
    try:
        plan = plan_of(job)
        if job.token and not _soon(lambda: os.path.exists(job.token)):
            raise QkitError(
                f"{socket.gethostname()} does not see {os.path.dirname(job.token)} of the machine that began",
                "choose a folder with -o on a file system that all machines share",
            )
        workers = max(1, min(cpus, plan.predicted.workers))
        compute_on(cpus)  # which the threads share
        shard = next(shard for shard in plan.shards if shard.file == file)
        return make_shard(shard, produce_of(plan), store or remote_store(plan), Threads(workers), lambda amount: None)
    except QkitError as error:
        return Refused(error.message, error.hint)


def make_part(job: Job, piece: Piece, statistics: Mapping[str, Moments]) -> Wire | Refused:
    """What comes of one part of a task that quantizes. statistics: what was seen of its source's inputs."""
    try:
        plan = plan_of(job)
        compute_on(1)
        produce = replace(produce_of(plan), statistics=statistics)
        return Wire(produce(replace(piece, read=None if piece.rows is None else produce.source.rows(piece.source))))
    except QkitError as error:
        return Refused(error.message, error.hint)


def compute_on(threads: int) -> None:
    """Let each of torch's and the kernels' operations use so many threads: a task has the cores that it was given."""
    import torch

    torch.set_num_threads(threads)


def plan_of(job: Job) -> Plan:
    """The driver's plan, made here. Raises QkitError where it is not."""
    try:
        plan = _made(replace(job, token="", largest=()))
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
