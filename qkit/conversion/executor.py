"""How tasks are run: here threads; the data path only sees the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol


class Executor(Protocol):
    """Runs tasks anywhere and in any order, and gives their results in the order of the tasks, a bounded number ahead.

    Here threads; on a cluster, remote workers. The bytes written are the same: what is committed, and in which order,
    is decided by whoever iterates."""

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """work(task) for each task, in order. What `work` raises is raised when its turn comes."""
        ...


AHEAD = 2  # tasks of each worker that are under way, or done and not taken: one is computed while another is written


class Threads:
    """An `Executor` on threads of this process, which share its cores: each computes with a team of its own."""

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        from collections import deque
        from concurrent.futures import Future, ThreadPoolExecutor

        import torch

        before = torch.get_num_threads()
        team = max(1, before // self.workers)
        # A thread's own number, as OpenMP has it; where a library takes it for all, it is put back below.
        pool = ThreadPoolExecutor(
            self.workers, thread_name_prefix="qkit", initializer=torch.set_num_threads, initargs=(team,)
        )
        pending: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                if len(pending) >= AHEAD * self.workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, task))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
