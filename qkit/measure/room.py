"""What can be loaded in the memory that there is, and what has to run block by block: by formula, before work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..models.families import BLOCK, EMBEDDINGS, module_of
from ..sources.untied import is_tied
from ..spec.dtypes import FLOATS
from . import fit, quality
from .states import IN_MEMORY

if TYPE_CHECKING:
    from ..hardware.detect import LocalDevice
    from ..sources.types import Source


@dataclass(frozen=True)
class Parts:
    """Bytes of the pieces that a model runs in: embedding, largest decoder block, and what comes after the blocks.
    reading: what is in the way while a tensor of a block is read."""

    embedding: int
    block: int
    head: int
    reading: int


@dataclass(frozen=True)
class Subject:
    """A model on its way through a profile.

    loaded    whether it is loaded whole; else it runs block by block
    overlap   what is known of its calibration text and the evaluation text"""

    name: str
    source: Source
    sizes: fit.Sizes
    parts: Parts
    loaded: bool = True
    overlap: str = ""


@dataclass(frozen=True)
class Room:
    """models, baseline: what is to be measured; beside: whether the baseline stays loaded beside each model."""

    models: tuple[Subject, ...]
    baseline: Subject | None
    beside: bool


def parts(source: Source, itemsize: int) -> Parts:
    """From the headers. Plain tensors are held in the type that the model runs in, of itemsize bytes."""
    blocks: Counter[str] = Counter()
    embedding = after = reading = 0
    for name in source.names():
        meta = source.meta(name)
        held = meta.numel * itemsize if meta.dtype in FLOATS else meta.nbytes
        block = BLOCK.search(name)
        if block:
            blocks[name[: block.end()]] += held
            # A tensor as it is stored beside the same in the model's type, or codes beside their kernel's layout; of
            # experts in one tensor one at a time.
            reading = max(reading, 2 * max(held, meta.nbytes) // (meta.shape[0] if len(meta.shape) == 3 else 1))
        elif module_of(name).rpartition(".")[2] in EMBEDDINGS:
            embedding += held
        else:
            after += held
    if is_tied(source):
        after += embedding
    return Parts(embedding, max(blocks.values(), default=0), after, reading)


def divide(
    models: Sequence[Subject],
    baseline: Subject | None,
    where: LocalDevice,
    context: int,
    batch: int,
    chunks: int,
    n_ctx: int,
) -> Room:
    """Which models are loaded on `where`, with what it has free.

    Raises QkitError for one that does not even fit block by block, and for a batch or a context that is too large for
    a model that fits otherwise."""
    free = where.available_bytes
    tail = _tail(baseline, chunks, n_ctx) if baseline else 0

    def loads(*subjects: Subject) -> fit.Load:
        return fit.Load([s.sizes for s in subjects], where, context, batch, n_ctx)

    placed = []
    for each in models:
        load = loads(each)
        loaded = load.weights + load.scoring + tail <= free and fit.check(load)
        placed.append(replace(each, loaded=loaded))
    beside = baseline is not None and all(each.loaded and loads(each, baseline).fits for each in placed)
    if baseline is not None:
        baseline = replace(baseline, loaded=beside or loads(baseline).fits)
    for each in [*placed, *([baseline] if baseline else [])]:
        if not each.loaded:
            _check_streamed(each, tail if each is not baseline else 0, where, chunks, n_ctx)
    return Room(tuple(placed), baseline, beside)


def _tail(subject: Subject, chunks: int, n_ctx: int) -> int:
    """Bytes that scoring takes of a model that is not loaded: its last hidden states, its head, a chunk's logits."""
    sizes = subject.sizes
    return _states(sizes, chunks, n_ctx) + subject.parts.head + n_ctx * sizes.arch.vocab * sizes.itemsize


def _states(sizes: fit.Sizes, chunks: int, n_ctx: int) -> int:
    nbytes = chunks * n_ctx * sizes.arch.hidden * sizes.itemsize
    return nbytes if nbytes <= IN_MEMORY else 0  # in a file else, whose pages the system can have back


def _check_streamed(subject: Subject, other: int, where: LocalDevice, chunks: int, n_ctx: int) -> None:
    """other: what the baseline keeps meanwhile."""
    sizes, pieces = subject.sizes, subject.parts
    running = pieces.block + pieces.reading + sizes.layer(n_ctx, 1)
    logits = _tail(subject, chunks, n_ctx) - _states(sizes, chunks, n_ctx)
    slices = 16 * min(quality.SLICE_ELEMENTS, n_ctx * sizes.arch.vocab)  # float32 logits, exponentials, differences
    need = other + _states(sizes, chunks, n_ctx) + max(pieces.embedding, running, logits + slices)
    if need > where.available_bytes:
        raise QkitError(
            f"{subject.name} needs {units.size(sizes.weights)} for weights and, even block by block, "
            f"{units.size(need)}: its largest decoder block takes {units.size(pieces.block)}, its output head "
            f"{units.size(pieces.head)}; {where.id} has {units.size(where.available_bytes)} free",
            "use a device with more memory, or raise --max-memory",
        )
