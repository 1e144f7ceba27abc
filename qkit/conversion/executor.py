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


class Threads:
    """An `Executor` on threads of this process."""

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        from collections import deque
        from concurrent.futures import Future, ThreadPoolExecutor

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="qkit")
        pending: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                if len(pending) >= self.workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, task))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
