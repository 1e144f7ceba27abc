"""What a conversion consists of: tasks (source tensors -> output tensors) and the files that hold their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..methods import METHODS
from ..models.families import BLOCK, why_kept
from ..sources.types import ROWS, found_in
from ..spec import LayerSpec
from ..spec.dtypes import TensorMeta

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..formats.expanded import Expanded
    from ..methods import Method
    from ..sources.types import Source

SHARD_BYTES = 2 * 10**9
SLAB_BYTES = 16 << 20  # of a tensor, handled at a time


@dataclass(frozen=True)
class Task:
    """Source tensors and what becomes of them.

    sources  names of one tensor, or of several of the same shape that are stacked along a new first dimension
    meta     of each source
    scheme   how they are quantized; None: passed through, for `reason`
    outputs  name and meta of each output, in writing order
    """

    sources: tuple[str, ...]
    meta: TensorMeta
    scheme: LayerSpec | None
    reason: str
    outputs: tuple[tuple[str, TensorMeta], ...]

    @property
    def name(self) -> str:
        return self.sources[0]

    @cached_property
    def numel(self) -> int:
        return self.meta.numel * len(self.sources)

    @cached_property
    def bytes_in(self) -> int:
        return self.meta.nbytes * len(self.sources)

    @cached_property
    def bytes_out(self) -> int:
        return sum(meta.nbytes for _, meta in self.outputs)

    @property
    def is_linear(self) -> bool:
        """Whether engines see a linear layer here, so that the config must name it where it is not quantized."""
        return (
            len(self.meta.shape) == 2
            and self.name.endswith(".weight")
            and why_kept(self.name, self.meta) != "embedding"
        )


@dataclass(frozen=True)
class Shard:
    """One output file. block: the decoder block whose tensors alone it holds, None for any others."""

    file: str
    tasks: tuple[Task, ...]
    block: int | None = None

    @property
    def bytes_in(self) -> int:
        return sum(t.bytes_in for t in self.tasks)

    @property
    def bytes_out(self) -> int:
        return sum(t.bytes_out for t in self.tasks)


def slab_ranges(meta: TensorMeta) -> list[tuple[int, int]]:
    """(first, end) of the rows of a tensor that are handled at a time."""
    rows = meta.shape[0]
    if meta.nbytes <= SLAB_BYTES:
        return [(0, rows)]
    step = max(ROWS, SLAB_BYTES // max(1, meta.nbytes // max(1, rows)) // ROWS * ROWS)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def row_ranges(task: Task, source: Source, fmt: Format, method: Method) -> list[tuple[int, int]] | None:
    """The ranges of rows in which the one tensor of a task is read, quantized and packed; None where it is small, or is
    handled whole."""
    if len(task.sources) > 1 or task.bytes_in <= SLAB_BYTES:
        return None
    if task.scheme is None:
        apart = task.outputs[0][1] == task.meta
    else:
        method = method if method.by_rows else METHODS["rtn"]  # what a calibrated method leaves: the head
        apart = fmt.by_rows and not method.whole(task.scheme)
        apart = apart and keeps_codes(source, task.name, task.scheme) is None
    return slab_ranges(task.meta) if apart and source.rows(task.name) is not None else None


def keeps_codes(source: Source, name: str, scheme: LayerSpec) -> Expanded | None:
    """The quantized checkpoint behind `source`, where it holds a weight's codes on the very grid that is wanted."""
    from ..formats.expanded import Expanded, same_grid

    found = found_in(source, Expanded)
    kept = found is not None and name in found.schemes and same_grid(found.schemes[name], scheme)
    return found if kept else None


def schemes_of(tasks: Iterable[Task]) -> dict[str, LayerSpec]:
    """Weight name -> scheme, for the quantized weights."""
    return {name: t.scheme for t in tasks if t.scheme is not None for name in t.sources}


def block_schemes(tasks: Iterable[Task]) -> dict[str, LayerSpec]:
    """`schemes_of` what lies in decoder blocks, and so has inputs that calibration reaches."""
    return {name: scheme for name, scheme in schemes_of(tasks).items() if BLOCK.search(name)}


def check_collisions(tasks: Iterable[Task]) -> None:
    """Raises QkitError where two outputs have one name."""
    seen = Counter(name for t in tasks for name, _ in t.outputs)
    twice = [name for name, n in seen.items() if n > 1]
    if twice:
        raise QkitError(f"the output would hold {twice[0]} twice", "the source has clashing tensor names")


def make_shards(tasks: Iterable[Task], limit: int = SHARD_BYTES, by_block: bool = False) -> tuple[Shard, ...]:
    """Split in order into files of at most `limit` bytes (one tensor may exceed it).

    by_block: each decoder block with quantized tensors has files of its own, after everything else: what a calibrated
    method has finished is then a finished file."""
    tasks = list(tasks)
    decoders = {m.string[: m.start(1)] for t in tasks if t.scheme and (m := BLOCK.search(t.name))}

    def block(t: Task) -> int | None:
        m = BLOCK.search(t.name) if by_block else None
        return int(m[1]) if m and t.name[: m.start(1)] in decoders else None

    if by_block:
        tasks.sort(key=lambda t: -1 if (b := block(t)) is None else b)
    groups: list[tuple[int | None, list[Task]]] = []
    used = 0
    for t in tasks:
        if not groups or groups[-1][0] != block(t) or used + t.bytes_out > limit:
            groups.append((block(t), []))
            used = 0
        groups[-1][1].append(t)
        used += t.bytes_out
    n = max(1, len(groups))
    names = (f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1))
    return tuple(Shard(name, tuple(own), index) for name, (index, own) in zip(names, groups, strict=False))
