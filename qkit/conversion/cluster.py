"""An executor on many machines: files, or the tensors of one file, are made by workers and noted by the driver.

A worker opens the same source, makes the same plan and writes into the same folder. What decides bytes is therefore
what decides them on one machine; driver and worker only agree that their plans are the same. What travels is small:
the job, a file's name, what the manifest is to say of it. Where there is one file to write, its quantized tensors
travel to the driver, which writes them in order.

Knows nothing of Ray: `ray_pool` is a `Pool`, and tests have one of processes that die.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..storage.local import TEMPORARY_SUFFIX, LocalStore, remove_temporaries
from .execute import Make, Written, make_shard, produce_of
from .executor import Threads
from .output import remote_store
from .pool import Job, Node, Pool, Refused, accepted, check_fits, compute_on, machines, plan_of
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
_AHEAD = 2  # tensors on their way for each that can be computed at once


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
        nodes = machines(self.pool)
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
        nodes, job = machines(self.pool), self._told(work)
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

    def _fits(self, produce: Produce, shards: Sequence[Shard], workers: int, nodes: list[Node]) -> int:
        """The bytes that a worker is granted."""
        needed = worker_memory(produce.source, shards, produce.fmt, produce.method, workers)
        check_fits(needed, nodes)
        return needed

    def apart(self, produce: Produce, shape: tuple[int, int]) -> Elsewhere:
        """Calibration by workers."""
        from .spread import Spread

        return Spread(self.pool, self.job, produce, shape)

    def _told(self, produce: Produce) -> Job:
        """The job with what the driver alone has seen."""
        cache = produce.plan.cache
        return self.job if cache is None else replace(self.job, largest=tuple(cache.largest.items()))


def _soon(true: Callable[[], bool]) -> bool:
    """Whether it is `true` within a few seconds."""
    until = time.monotonic() + _SEEN
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


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


def _await(store: Store, file: str) -> None:
    """Raises QkitError where a file that a worker has written is not seen here."""
    if not _soon(lambda: store.has(file)):
        raise QkitError(
            f"a worker wrote {file}, and it is not in {store.label} here",
            "the folder of OUT has to lie on a file system that all machines share",
        )


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
