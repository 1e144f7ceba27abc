"""Plan -> files: every tensor read, quantized, packed and written; a finished decoder block is a finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from ..hardware import memory
from ..models.config import positive_int, text_config
from ..models.families import is_kv_scale, module_of
from ..progress import notify, track
from ..storage.crc import combine
from ..storage.store import FileDigest
from .containers import CONTAINERS
from .executor import Executor
from .produce import Part, Produce, outputs, parts_of
from .record import computed_on, digest_of, record
from .tasks import SLAB_BYTES, block_schemes

if TYPE_CHECKING:
    import torch

    from ..calibrate.statistics import Moments
    from ..formats.base import Format
    from ..kernels.weight import Weight
    from ..sources.types import Source
    from ..storage.store import Store
    from ..storage.writer import Pieces
    from .output import Work
    from .plan import Plan
    from .tasks import Shard, Task


# What a method that observes the whole model saw: mean squares of every quantized weight's inputs.
STATISTICS = "imatrix.safetensors"


def write_weights(plan: Plan, source: Source, work: Work, executor: Executor, tokens: torch.Tensor | None) -> None:
    """Write every file of weights that is not there yet. tokens: calibration windows, None for data-free methods."""
    if plan.cache is not None:
        assert tokens is not None
        plan.cache.largest = _observed_cache(plan, source, work, tokens)
    if plan.method.needs is None:
        tokens = None
    produce = produce_of(plan)
    if tokens is not None and plan.method.observes:
        produce = replace(produce, statistics=_observed(plan, source, work, tokens))
        tokens = None
    # First what belongs to no block, the embeddings among it: the largest tensors, before any statistics are held.
    _write_shards([s for s in plan.shards if tokens is None or s.block is None], produce, work, executor)
    if tokens is not None:
        _write_blocks(plan, produce, work, executor, tokens)
        _write_shards(plan.shards, produce, work, executor)  # blocks of which nothing is quantized


def produce_of(plan: Plan) -> Produce:
    """What makes the outputs of a plan's tasks, from the source alone."""
    options = {name: getattr(plan.options, name) for name in plan.method.options}
    return Produce(plan, plan.view, plan.fmt, plan.method, options)


def _observed(plan: Plan, source: Source, work: Work, tokens: torch.Tensor) -> dict[str, Moments]:
    """The statistics of every quantized weight's inputs, in a file of their own as soon as they are all there."""
    from ..calibrate.observe import observe, read_moments, write_moments
    from ..storage.manifest import file_entry

    if not work.has(STATISTICS):
        with track("observing", positive_int(text_config(source.config), "num_hidden_layers", 1), "blocks") as advance:
            schemes, place = block_schemes(plan.tasks), work.scratch
            found = observe(source, schemes, tokens, device=plan.device, folder=place, advance=lambda: advance(1))
        work.note(files={STATISTICS: file_entry(write_moments(work.store, STATISTICS, found))})
    return read_moments(work.store, STATISTICS)


def _observed_cache(plan: Plan, source: Source, work: Work, tokens: torch.Tensor) -> dict[str, float]:
    """The largest magnitude behind each scale of the KV cache, in the manifest as soon as they are all there."""
    from ..calibrate.observe import observe_cache

    assert plan.cache is not None
    noted = work.manifest.tensors
    if not all(name in noted for name in plan.cache.scales):
        with track("observing", positive_int(text_config(source.config), "num_hidden_layers", 1), "blocks") as advance:
            found = observe_cache(source, tokens, device=plan.device, folder=work.scratch, advance=lambda: advance(1))
        more = {"calibration_tokens": tokens.numel(), "computed_on": computed_on(plan.device)}
        work.note(
            tensors={
                name: {"method": "largest magnitude / 448", "largest": found[name], **more}
                for name in plan.cache.scales
            }
        )
    return {name: float(noted[name]["largest"]) for name in plan.cache.scales}


def _write_shards(shards: Sequence[Shard], produce: Produce, work: Work, executor: Executor) -> None:
    left = [shard for shard in shards if not work.has(shard.file)]
    if left:
        with track("writing", sum(shard.bytes_in for shard in left), "bytes") as advance:
            for shard, written in executor.files(Make(produce, work.store, executor, advance), left):
                commit(shard, written, work)


def _write_blocks(plan: Plan, produce: Produce, work: Work, executor: Executor, tokens: torch.Tensor) -> None:
    """Run the calibrated method over the decoder blocks; each goes to its file as soon as it is quantized."""
    from ..calibrate.blocks import quantize_blocks

    shards: dict[int, list[Shard]] = {}
    for shard in plan.shards:
        if shard.block is not None:
            shards.setdefault(shard.block, []).append(shard)
    if all(work.has(shard.file) for own in shards.values() for shard in own):
        return

    def finished(index: int) -> Mapping[str, Weight | torch.Tensor] | None:
        own = shards.get(index, [])
        if not own or not all(work.has(shard.file) for shard in own):
            return None
        return _finished_block(own, produce.fmt, work, replaced=plan.method.prepares)

    with track(plan.method.name, len(shards), "blocks") as advance:
        for result in quantize_blocks(
            produce.source,
            block_schemes(plan.tasks),
            tokens,
            plan.method,
            device=plan.device,
            done=finished,
            waiting=plan.predicted.waiting,
            folder=work.scratch,
            elsewhere=executor.apart(produce, (tokens.shape[0], tokens.shape[1])),
            **produce.options,
        ):
            for name, layer in result.layers.items():
                if layer.fallback:
                    notify(f"WARNING: {name} fell back to rounding: {layer.fallback}")
            if result.layers:
                own = replace(produce, block=result, computed_on=computed_on(plan.device))
                for shard in shards[result.index]:
                    _write_shard(shard, own, work, executor, lambda amount: None)
            advance(1)


def _finished_block(shards: list[Shard], fmt: Format, work: Work, replaced: bool) -> dict[str, Weight | torch.Tensor]:
    """What an earlier run made of a block, for the forward pass of this one. replaced: tensors that are not quantized
    may differ from the source's."""
    from ..storage.safetensors import SafetensorsFile

    found: dict[str, Weight | torch.Tensor] = {}
    for shard in shards:
        file = SafetensorsFile(work.store.open(shard.file))
        for task in shard.tasks:
            if task.scheme is not None:
                found |= read_weights(task, fmt, file.read)
            elif replaced and not is_kv_scale(task.name):
                found |= zip(task.sources, parts_of(task, file.read(task.outputs[0][0])), strict=True)
        file.close()
    return found


def read_weights(task: Task, fmt: Format, read: Callable[[str], torch.Tensor]) -> dict[str, Weight]:
    """Source name -> weight, from a quantized task's outputs as they were written. read: (name) -> tensor."""
    assert task.scheme is not None
    place = fmt.place(module_of(task.name)) + fmt.joint
    outputs = {name.removeprefix(place): parts_of(task, read(name)) for name, _ in task.outputs}
    return {
        source: fmt.unpack({local: tensors[i] for local, tensors in outputs.items()}, task.scheme)
        for i, source in enumerate(task.sources)
    }


@dataclass
class Written:
    """A file of weights that is there, and what the manifest is to say of it: entries of quantized weights and digests
    of source tensors, by name."""

    file: FileDigest
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def note(self, task: Task, parts: Sequence[Part]) -> None:
        """What the manifest says of a task that is written. parts: of all its sources, in order."""
        for name, own in groupby(parts, lambda part: part.source):
            first, *rest = own
            crc, lost, total = first.crc, *first.squared
            for part in rest:
                crc = combine(crc, part.crc, part.nbytes)
                lost, total = lost + part.squared[0], total + part.squared[1]
            self.digests[name] = digest_of(crc)
            if task.scheme is not None:
                self.entries[name] = record(task, squared=(lost, total), **first.facts)


def make_shard(
    shard: Shard, produce: Produce, store: Store, executor: Executor, advance: Callable[[int], None]
) -> Written:
    """Write one file. advance: called with the source bytes of each task that is done."""
    written = Written(FileDigest("", 0))

    def stream() -> Iterator[torch.Tensor | Pieces]:
        parts = _given_back(executor.run(produce, (job for task in shard.tasks for job in produce.jobs(task))))
        for task in shard.tasks:
            yield from outputs(task, islice(parts, produce.count(task)), written.note)
            advance(task.bytes_in)

    written.file = CONTAINERS[produce.fmt.container].write(produce.plan, store, shard, stream())
    return written


def _given_back(parts: Iterator[Part]) -> Iterator[Part]:
    """The parts. Now and then the system gets what was freed of them: codes and values of rows, which are too small for
    malloc to do that."""
    passed = 0
    for part in parts:
        passed += part.nbytes
        if passed >= 8 * SLAB_BYTES:
            memory.give_back()
            passed = 0
        yield part


@dataclass(frozen=True)
class Make:
    """`make_shard` of one file after another: what an executor gets to call, or to have called elsewhere."""

    produce: Produce
    store: Store
    executor: Executor
    advance: Callable[[int], None]

    def __call__(self, shard: Shard) -> Written:
        return make_shard(shard, self.produce, self.store, self.executor, self.advance)


def _write_shard(
    shard: Shard, produce: Produce, work: Work, executor: Executor, advance: Callable[[int], None]
) -> None:
    commit(shard, make_shard(shard, produce, work.store, executor, advance), work)


def commit(shard: Shard, written: Written, work: Work) -> None:
    """Note a file in the manifest: it is finished."""
    from ..storage.manifest import file_entry

    work.note(files={shard.file: file_entry(written.file)}, tensors=written.entries, sources=written.digests)
