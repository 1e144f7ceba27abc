"""The check after writing: what is on the disk is what was planned, and dequantizes to what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.families import is_kv_scale, module_of
from ..progress import track
from .containers import CONTAINERS, Tensors
from .execute import read_weights
from .produce import compared, digests
from .record import digest_of
from .tasks import row_ranges

if TYPE_CHECKING:
    from ..kernels.weight import Weight
    from .executor import Executor
    from .output import Work
    from .plan import Plan
    from .tasks import Task

SAMPLES = 8  # weights measured again against the source: enough to catch a wrong layout, cheap enough to be default
_HINT = "run the same command again: it keeps what is right and writes the rest anew; if it repeats, check the disk"


def verify_result(plan: Plan, work: Work) -> None:
    """Raises QkitError unless every hash, every tensor's type and shape, and a sample of errors agree.

    The sampled weights are read back, unpacked, dequantized and compared with the source: their error must be
    the one noted while quantizing. Files that do not agree are forgotten, so that the same command repairs them."""
    with track("verifying", 1, "steps") as advance:
        damaged = _damaged(work)
        advance(1)
    if damaged:
        work.drop(damaged)
        raise QkitError(f"verification failed: {next(iter(damaged.values()))}", _HINT)
    written = CONTAINERS[plan.fmt.container].open(work.store, plan.shards)
    files = {name: shard.file for shard in plan.shards for t in shard.tasks for name, _ in t.outputs}
    for task in plan.tasks:
        for name, meta in task.outputs:
            if written.meta(name) != meta:
                work.drop([files[name]])
                raise QkitError(f"verification failed: {name} is {written.meta(name)}, planned was {meta}", _HINT)
    for task in sample([t for t in plan.tasks if t.scheme is not None]):
        _compare(plan, work, task, written, files)


def _compare(plan: Plan, work: Work, task: Task, written: Tensors, files: Mapping[str, str]) -> None:
    """A task's weights against the source. By itself, so that nothing of one is held while the next is read."""
    for name, weight in _weights(plan, task, written):
        crc, error = compared(plan.view, name, weight)
        if digest_of(crc) != work.manifest.sources[name]:
            raise _changed(name)
        expected = work.manifest.tensors[name]["weight_error"]
        if abs(error - expected) > 1e-4 * max(expected, 1e-3):
            work.drop({files[output] for output, _ in task.outputs})
            raise QkitError(
                f"verification failed: {name} reads back with error {error:.6g}, noted was {expected:.6g}", _HINT
            )


def _weights(plan: Plan, task: Task, written: Tensors) -> Iterator[tuple[str, Callable[[int, int], Weight]]]:
    """(source name, (first, end) -> rows of the weight) for each of a task's sources. Where rows follow each other in
    the files they are read as they are asked for."""
    ranges = row_ranges(task, plan.view, plan.fmt, plan.method) if plan.fmt.rows_follow else None
    if ranges is None:
        for name, weight in read_weights(task, plan.fmt, written.read).items():
            yield name, weight.plain().rows
        return
    assert task.scheme is not None
    fmt, scheme, in_features = plan.fmt, task.scheme, task.meta.shape[1]
    place = fmt.place(module_of(task.name)) + fmt.joint
    step = fmt.out_metas((ranges[0][1], in_features), scheme)

    def rows(first: int, end: int) -> Weight:
        tensors = {}
        for name, whole in task.outputs:
            local = name.removeprefix(place)
            if step[local] == whole or fmt.once(local):  # the same for all rows: a table, a shape
                tensors[local] = written.read(name)
                continue
            begin = first // ranges[0][1] * step[local].shape[0]
            count = fmt.out_metas((end - first, in_features), scheme)[local].shape[0]
            tensors[local] = written.part(name, begin, begin + count)
        return fmt.unpack(tensors, scheme, end - first).plain()

    yield task.name, rows


def check_inherited(plan: Plan, work: Work, executor: Executor) -> None:
    """Raises QkitError unless the source still holds every value that earlier runs made their files of: its
    fingerprint samples the tensors, and a result made of two versions would fit neither."""
    inherited = [task for shard in plan.shards if shard.file in work.inherited for task in shard.tasks]
    tasks = [task for task in inherited if not is_kv_scale(task.name)]  # which is none of the source's
    with track("comparing the source", sum(t.bytes_in for t in tasks), "bytes") as advance:
        for task, found in zip(tasks, executor.run(partial(digests, plan.view), tasks), strict=True):
            for name, value in found.items():
                if value != work.manifest.sources.get(name):
                    raise _changed(name)
            advance(task.bytes_in)


def _changed(name: str) -> QkitError:
    return QkitError(
        f"{name} is not what it was when it was converted",
        "leave the source alone while it is converted, and start again with --restart",
    )


def _damaged(work: Work) -> dict[str, str]:
    """Name -> what is wrong, for each file that is not what the manifest says."""
    problems = {}
    for problem in work.manifest.verify(work.store):
        name = problem.partition(": ")[0]
        if name in work.manifest.files:
            problems[name] = problem
    return problems


def sample(tensors: list[Task], count: int = SAMPLES) -> list[Task]:
    """Tensors of every kind (q_proj, down_proj, ...), from the first block to the last: at least `count` where there
    are as many, and at least one of each kind."""
    kinds: dict[str, list[Task]] = {}
    for t in tensors:
        kinds.setdefault(module_of(t.name).rpartition(".")[2], []).append(t)
    each = -(-count // max(1, len(kinds)))
    chosen = []
    for i, members in enumerate(kinds.values()):
        for k in range(min(each, len(members))):
            at = (i + k * len(kinds)) / max(1, len(kinds) * each - 1)  # 0 .. 1 over all that are chosen
            chosen.append(members[round(at * (len(members) - 1))])
    return chosen
