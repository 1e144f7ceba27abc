"""How tasks are run: here threads, on a cluster `cluster.Cluster`; the data path only sees the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import QkitError
from ..methods.base import divided

if TYPE_CHECKING:
    from ..calibrate.blocks import Elsewhere
    from ..methods import Method
    from .options import Options


class Executor(Protocol):
    """Runs tasks anywhere and in any order, and gives their results in the order of the tasks, a bounded number ahead.

    Here threads; on a cluster, remote workers. The bytes written are the same: what is committed, and in which order,
    is decided by whoever iterates."""

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """work(task) for each task, in order. What `work` raises is raised when its turn comes."""
        ...

    def files(self, make: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """(shard, make(shard)) for each file, in whatever order they are finished. What `make` raises is raised."""
        ...

    def apart(self, produce: Any, shape: tuple[int, int]) -> Elsewhere | None:
        """What calibrates in the place of this process, if anything does. shape: [samples, length] of the text."""
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

    def files(self, make: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """One after another: the threads are busy with the tasks of each."""
        for shard in shards:
            yield shard, make(shard)

    def apart(self, produce: Any, shape: tuple[int, int]) -> None:
        return None


def check_spread(options: Options, method: Method, container: str) -> None:
    """Raises QkitError for what cannot be spread over files or machines."""
    if options.shard_size is not None and container == "gguf":
        raise QkitError("--shard-size does not apply to GGUF, where everything is in one file", "drop it")
    if options.ray is None:
        return
    by_block = method.needs is not None and not method.observes
    if by_block and (method.needs != "hessian" or method.prepares or divided(method) is None):
        raise QkitError(f"--ray does not spread method {method.name}", "drop --ray, or use another method")
    if by_block and options.device not in ("auto", "cpu"):
        raise QkitError(f"--ray calibrates on processors, not on {options.device}", "drop --device, or --ray")
    if find_spec("ray") is None:
        raise QkitError("--ray needs Ray, which is not installed", "pip install 'qkit-llm[ray]'")
