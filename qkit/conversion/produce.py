"""Tasks in parts: rows of a matrix are read, quantized and packed apart, and put together as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..methods import METHODS
from ..storage.crc import combine
from ..storage.writer import Pieces
from .record import check_finite, digest_of, relative_error
from .tasks import keeps_codes, row_ranges, slab_ranges

if TYPE_CHECKING:
    import torch

    from ..calibrate.block import BlockResult
    from ..calibrate.statistics import Moments
    from ..formats.base import Format
    from ..kernels.weight import Weight
    from ..methods import Method, Quantized
    from ..sources.types import Rows, Source
    from ..spec import LayerSpec
    from ..spec.dtypes import TensorMeta
    from .plan import Plan
    from .tasks import Task


@dataclass(frozen=True)
class Job:
    """One source tensor of a task, or rows of it, which `read` gives."""

    task: Task
    source: str
    rows: tuple[int, int] | None = None
    read: Rows | None = None


@dataclass
class Part:
    """What a job gave.

    outputs  those of its task, in writing order, for its rows alone
    crc      CRC-32 of what it read, which had `nbytes`
    squared  (||W - Wq||^2, ||W||^2) of its rows
    facts    what else the manifest says of a quantized weight: its method, ...
    """

    source: str
    outputs: list[torch.Tensor]
    crc: int
    nbytes: int
    squared: tuple[float, float] = (0.0, 0.0)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Produce:
    """Job -> part: quantized, or passed through. With the result of a block, what a calibrated method made of it; else
    from the source alone, by a method that needs no data."""

    plan: Plan
    source: Source
    fmt: Format
    method: Method
    options: Mapping[str, Any]
    block: BlockResult | None = None
    computed_on: str | None = None
    statistics: Mapping[str, Moments] = field(default_factory=dict)

    def jobs(self, task: Task) -> Iterator[Job]:
        ranges = self._ranges(task)
        if ranges is None:
            yield from (Job(task, name) for name in task.sources)
            return
        read = self.source.rows(task.name)
        for rows in ranges:
            yield Job(task, task.name, rows, read)

    def count(self, task: Task) -> int:
        """How many jobs a task has."""
        ranges = self._ranges(task)
        return len(task.sources) if ranges is None else len(ranges)

    def _ranges(self, task: Task) -> Sequence[tuple[int, int]] | None:
        if self.block is not None and (task.name in self.block.layers or task.name in self.block.replaced):
            return None
        return row_ranges(task, self.source, self.fmt, self.method)

    def __call__(self, job: Job) -> Part:
        from ..kernels import crc32
        from ..kernels.codes import squared_error

        task, name = job.task, job.source
        if self.block is not None and name in self.block.layers:
            return self._calibrated(task, name, self.block)
        kept = None if task.scheme is None else _repacked(self.source, name, task.scheme)
        if kept is not None:
            crc, nbytes, squared = _compared(self.source, name, kept.plain().rows)
            return Part(name, self._packed(task, kept), crc, nbytes, squared, {"method": "repacked"})
        tensor = self.source.read(name) if job.rows is None or job.read is None else job.read(*job.rows)
        part = Part(name, [], crc32(tensor), tensor.nbytes)
        if task.scheme is None:
            check_finite(name, tensor)
            part.outputs = [tensor if self.block is None else self.block.replaced.get(name, tensor)]
            return part
        done = self._quantized(name, tensor, task.scheme)
        part.squared = done.squared or squared_error(tensor, done.weight)
        moments = self.statistics.get(name)
        tokens = None if moments is None else moments.tokens
        part.facts = {"method": done.method, "calibration_tokens": tokens, "fallback": done.fallback}
        del tensor
        part.outputs = self._packed(task, done.weight, None if job.rows is None else task.meta.shape[0])
        return part

    def _packed(self, task: Task, weight: Weight, of: int | None = None) -> list[torch.Tensor]:
        made = self.fmt.pack(weight, task.scheme) if of is None else self.fmt.pack(weight, task.scheme, of)
        return list(made.values())

    def _calibrated(self, task: Task, name: str, block: BlockResult) -> Part:
        """By the method that ran over the block."""
        done = block.layers[name]
        assert done.squared is not None  # of the source's weight, whatever the method folded into it before
        facts = {
            "method": done.method,
            "output_error": done.output_error,
            "calibration_tokens": block.tokens.get(name),
            "fallback": done.fallback,
            "computed_on": self.computed_on,
        }
        return Part(name, self._packed(task, done.weight), block.checksums[name], 0, done.squared, facts)

    def _quantized(self, name: str, tensor: torch.Tensor, scheme: LayerSpec) -> Quantized:
        try:
            moments = self.statistics.get(name)
            if self.method.needs and moments is None:  # of no decoder block: the head
                (done,) = METHODS["rtn"].quantize([tensor], None, [scheme])
            else:
                (done,) = self.method.quantize([tensor], moments, [scheme], **self.options)
        except QkitError as e:
            raise QkitError(f"{name}: {e.message}", e.hint) from e
        return done


def _repacked(source: Source, name: str, scheme: LayerSpec) -> Weight | None:
    """The codes that the source stores, where they are on the grid that is wanted."""
    from ..formats.expanded import repacked

    found = keeps_codes(source, name, scheme)
    if found is None:
        return None
    try:
        return repacked(found.weight(name), scheme)
    except QkitError as error:
        raise QkitError(f"{name}: {error.message}", error.hint) from error


def compared(source: Source, name: str, weight: Callable[[int, int], Weight]) -> tuple[int, float]:
    """(CRC-32 of a source tensor, ||W - Wq|| / ||W||), read in parts where that can be. weight: (first, end) -> rows of
    what it became; called for `slab_ranges`, in order, or once for all."""
    crc, _, squared = _compared(source, name, weight)
    return crc, relative_error(squared)


def digests(source: Source, task: Task) -> dict[str, str]:
    """`record.digest_of` the source tensors of a task, by name, read in parts where that can be."""
    return {name: digest_of(_compared(source, name)[0]) for name in task.sources}


def _compared(
    source: Source, name: str, weight: Callable[[int, int], Weight] | None = None
) -> tuple[int, int, tuple[float, float]]:
    """(CRC-32 of a source tensor, its bytes, `squared_error` against `weight`), read in parts where that can be."""
    from ..kernels import crc32
    from ..kernels.codes import squared_error

    meta, rows = source.meta(name), source.rows(name)
    ranges = slab_ranges(meta) if rows is not None and meta.shape else [(0, meta.shape[0] if meta.shape else 1)]
    crc, nbytes, lost, total = 0, 0, 0.0, 0.0
    for part in ranges:
        tensor = source.read(name) if rows is None or not meta.shape else rows(*part)
        crc = combine(crc, crc32(tensor), tensor.nbytes)
        nbytes += tensor.nbytes
        if weight is not None:
            more = squared_error(tensor, weight(*part))
            lost, total = lost + more[0], total + more[1]
        del tensor  # before the next one is read
    return crc, nbytes, (lost, total)


def outputs(
    task: Task, parts: Iterator[Part], note: Callable[[Task, Sequence[Part]], None]
) -> Iterator[torch.Tensor | Pieces]:
    """A task's outputs in writing order, from the parts of all its sources, which come in order. The first is given on
    in pieces where the parts follow each other in it; the others are put together meanwhile. note: called last."""
    metas = [meta for _, meta in task.outputs]
    first = next(parts)
    seen = [first]
    axes = [_axis(task, meta, t) for meta, t in zip(metas, first.outputs, strict=True)]
    if all(axis is None for axis in axes):
        yield from first.outputs
        note(task, seen)
        return
    whole = _Joined(task, metas, axes)

    def each() -> Iterator[torch.Tensor]:
        yield whole.take(first)
        first.outputs = []
        for part in parts:
            seen.append(part)
            yield whole.take(part)
            part.outputs = []  # or they would live until the task is done

    if axes[0] == 0:
        yield Pieces(metas[0], each())
    else:
        for piece in each():
            whole.put(0, piece)
        yield whole.tensors.pop(0)
    yield from (whole.tensors[index] for index in range(1, len(metas)))
    note(task, seen)


def _axis(task: Task, meta: TensorMeta, part: torch.Tensor) -> int | None:
    """Along which dimension parts lie in an output; None where a part is all of it."""
    if len(task.sources) > 1:
        return 0
    differ = [k for k, (n, m) in enumerate(zip(meta.shape, part.shape, strict=True)) if n != m]
    assert len(differ) < 2
    return differ[0] if differ else None


class _Joined:
    """Outputs but the first, as parts come."""

    def __init__(self, task: Task, metas: Sequence[TensorMeta], axes: Sequence[int | None]):
        self._stacked, self._metas, self._axes = len(task.sources) > 1, metas, axes
        self._filled = [0] * len(metas)
        self.tensors: dict[int, torch.Tensor] = {}  # by the place of the output

    def take(self, part: Part) -> torch.Tensor:
        """Put a part in its place but for its first output, which is returned."""
        made = [t.unsqueeze(0) for t in part.outputs] if self._stacked else part.outputs
        for index, t in enumerate(made[1:], 1):
            self.put(index, t)
        return made[0]

    def put(self, index: int, part: torch.Tensor) -> None:
        import torch

        from ..spec.dtypes import torch_dtype

        axis = self._axes[index]
        if axis is None:
            self.tensors[index] = part
            return
        at = self._filled[index]
        if index not in self.tensors:
            meta = self._metas[index]
            self.tensors[index] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
        self.tensors[index].narrow(axis, at, part.shape[axis]).copy_(part)
        self._filled[index] += part.shape[axis]


def parts_of(task: Task, output: torch.Tensor) -> Sequence[torch.Tensor]:
    """An output's share of each of the task's sources."""
    return [output] if len(task.sources) == 1 else list(output)
