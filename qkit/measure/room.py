"""What can be loaded in the memory that there is, and what has to run block by block: by formula, before work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import units
from ..calibrate.states import IN_MEMORY
from ..errors import QkitError
from ..models.families import BLOCK, EMBEDDINGS, module_of
from ..sources.untied import is_tied
from ..spec.dtypes import FLOATS
from . import fit, quality

if TYPE_CHECKING:
    from ..hardware.detect import LocalDevice
    from ..sources.types import Source
    from ..spec.dtypes import TensorMeta


@dataclass(frozen=True)
class Parts:
    """Bytes of the pieces that a model runs in: embedding, largest decoder block, and what comes after the blocks.
    reading, reading_around: what more is held while a tensor of a block is read, and one of the rest."""

    embedding: int
    block: int
    head: int
    reading: int
    reading_around: int


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
    embedding = after = 0
    reading = [0, 0]
    for name in source.names():
        meta = source.meta(name)
        held = meta.numel * itemsize if meta.dtype in FLOATS else meta.nbytes
        block = BLOCK.search(name)
        reading[not block] = max(reading[not block], _reading(source, meta, held))
        if block:
            blocks[name[: block.end()]] += held
        elif module_of(name).rpartition(".")[2] in EMBEDDINGS:
            embedding += held
        else:
            after += held
    if is_tied(source):
        after += embedding
    return Parts(embedding, max(blocks.values(), default=0), after, *reading)


def _reading(source: Source, meta: TensorMeta, held: int) -> int:
    """Bytes beside a tensor while it is read: what it is unpacked from; of experts in one tensor one at a time."""
    if meta.dtype not in FLOATS:  # codes, unpacked and packed again: 2 to 3 bytes for each of 4 bits were seen
        nbytes = 8 * meta.nbytes
    elif source.stored.quantized and "quantization_config" not in source.config:  # GGUF: values as it gives them
        nbytes = 4 * meta.numel + meta.nbytes
    else:
        nbytes = meta.nbytes if meta.nbytes != held else 0
    return nbytes // (meta.shape[0] if len(meta.shape) == 3 else 1)


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

    def scores(load: fit.Load, each: Subject) -> bool:
        return load.weights + load.scoring + _working(each, baseline, n_ctx) <= free

    placed = []
    for each in models:
        load = loads(each)
        loaded = scores(load, each) and load.weights + load.scoring + tail <= free and fit.check(load)
        placed.append(replace(each, loaded=loaded))

    def beside(each: Subject, other: Subject) -> bool:
        load = loads(each, other)
        return each.loaded and load.fits and scores(load, each)

    together = baseline is not None and all(beside(each, baseline) for each in placed)
    if baseline is not None:
        baseline = replace(baseline, loaded=together or loads(baseline).fits)
    for each in placed:
        if not each.loaded:
            _check_streamed(each, baseline, where, chunks, n_ctx)
    if baseline is not None and not baseline.loaded:
        _check_streamed(baseline, None, where, chunks, n_ctx)
    return Room(tuple(placed), baseline, together)


def _tail(subject: Subject, chunks: int, n_ctx: int) -> int:
    """Bytes that scoring holds of a model that is not loaded: its last hidden states, its head, a chunk's logits."""
    sizes = subject.sizes
    return _states(sizes, chunks, n_ctx) + subject.parts.head + n_ctx * sizes.arch.vocab * sizes.itemsize


def _states(sizes: fit.Sizes, chunks: int, n_ctx: int) -> int:
    nbytes = chunks * n_ctx * sizes.arch.hidden * sizes.itemsize
    return nbytes if nbytes <= IN_MEMORY else 0  # in a file else, whose pages the system can have back


def _working(subject: Subject, baseline: Subject | None, n_ctx: int) -> int:
    """Bytes beside heads and logits while scoring: a head as it is read, then what is made of a few positions at a
    time: logits, exponentials and differences in float32."""
    slices = 16 * min(quality.SLICE_ELEMENTS, n_ctx * subject.sizes.arch.vocab)
    return max(slices, *(each.parts.reading_around for each in (subject, baseline) if each))


def _check_streamed(subject: Subject, baseline: Subject | None, where: LocalDevice, chunks: int, n_ctx: int) -> None:
    """baseline: what the model is compared with."""
    sizes, pieces = subject.sizes, subject.parts
    states = _states(sizes, chunks, n_ctx)
    embedding = pieces.embedding + pieces.reading_around
    running = pieces.block + pieces.reading + sizes.layer(n_ctx, 1)
    scoring = _tail(subject, chunks, n_ctx) - states + _working(subject, baseline, n_ctx)
    other = _tail(baseline, chunks, n_ctx) if baseline else 0
    need = max(states + max(embedding, running), states + scoring + other)
    if need > where.available_bytes:
        raise QkitError(
            f"{subject.name} needs {units.size(sizes.weights)} for weights and, even block by block, "
            f"{units.size(need)}: its largest decoder block takes {units.size(pieces.block)}, its output head "
            f"{units.size(pieces.head)}; {where.id} has {units.size(where.available_bytes)} for it",
            "use a device with more memory, or raise --max-memory",
        )
