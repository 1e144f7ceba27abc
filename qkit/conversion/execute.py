"""Plan -> files: every tensor read, quantized, packed and written; a finished decoder block is a finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..methods import METHODS
from ..models.config import positive_int, text_config
from ..models.families import is_kv_scale, module_of
from ..progress import notify, track
from ..storage.writer import Pieces
from .containers import CONTAINERS
from .executor import Executor
from .record import check_finite, computed_on, digest, noted, record, weight_error
from .tasks import block_schemes, in_slabs

if TYPE_CHECKING:
    import torch

    from ..calibrate.block import BlockResult
    from ..calibrate.statistics import Moments
    from ..formats.base import Format
    from ..kernels.weight import Weight
    from ..methods import Method
    from ..sources.types import Source
    from ..spec import LayerSpec
    from ..storage.store import FileDigest, Store
    from .plan import Plan
    from .tasks import Shard, Task
    from .workspace import Workspace


# What a method that observes the whole model saw: mean squares of every quantized weight's inputs.
STATISTICS = "imatrix.safetensors"


@dataclass
class Produced:
    """What a task gave: its outputs in writing order; entries of the manifest by name of the weight, for quantized
    ones; digests of the source tensors by name."""

    outputs: Sequence[torch.Tensor | Pieces]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def write_weights(plan: Plan, source: Source, work: Workspace, executor: Executor, tokens: torch.Tensor | None) -> None:
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


def _observed(plan: Plan, source: Source, work: Workspace, tokens: torch.Tensor) -> dict[str, Moments]:
    """The statistics of every quantized weight's inputs, in a file of their own as soon as they are all there."""
    from ..calibrate.observe import observe, read_moments, write_moments
    from ..storage.manifest import file_entry

    if not work.has(STATISTICS):
        with track("observing", positive_int(text_config(source.config), "num_hidden_layers", 1), "blocks") as advance:
            found = observe(source, block_schemes(plan.tasks), tokens, device=plan.device, advance=lambda: advance(1))
        work.manifest.files[STATISTICS] = file_entry(write_moments(work.store, STATISTICS, found))
        work.manifest.save(work.folder)
    return read_moments(work.store, STATISTICS)


def _observed_cache(plan: Plan, source: Source, work: Workspace, tokens: torch.Tensor) -> dict[str, float]:
    """The largest magnitude behind each scale of the KV cache, in the manifest as soon as they are all there."""
    from ..calibrate.observe import observe_cache

    assert plan.cache is not None
    noted = work.manifest.tensors
    if not all(name in noted for name in plan.cache.scales):
        with track("observing", positive_int(text_config(source.config), "num_hidden_layers", 1), "blocks") as advance:
            found = observe_cache(source, tokens, device=plan.device, advance=lambda: advance(1))
        for name in plan.cache.scales:
            noted[name] = {
                "method": "largest magnitude / 448",
                "largest": found[name],
                "calibration_tokens": tokens.numel(),
                "computed_on": computed_on(plan.device),
            }
        work.manifest.save(work.folder)
    return {name: float(noted[name]["largest"]) for name in plan.cache.scales}


def _write_shards(shards: Sequence[Shard], produce: Produce, work: Workspace, executor: Executor) -> None:
    left = [shard for shard in shards if not work.has(shard.file)]
    if left:
        with track("writing", sum(shard.bytes_in for shard in left), "bytes") as advance:
            for shard, written in executor.files(Make(produce, work.store, executor, advance), left):
                commit(shard, written, work)


def _write_blocks(plan: Plan, produce: Produce, work: Workspace, executor: Executor, tokens: torch.Tensor) -> None:
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


def _finished_block(
    shards: list[Shard], fmt: Format, work: Workspace, replaced: bool
) -> dict[str, Weight | torch.Tensor]:
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
                found |= zip(task.sources, parts(task, file.read(task.outputs[0][0])), strict=True)
        file.close()
    return found


def read_weights(task: Task, fmt: Format, read: Callable[[str], torch.Tensor]) -> dict[str, Weight]:
    """Source name -> weight, from a quantized task's outputs as they were written. read: (name) -> tensor."""
    assert task.scheme is not None
    place = fmt.place(module_of(task.name)) + fmt.joint
    outputs = {name.removeprefix(place): parts(task, read(name)) for name, _ in task.outputs}
    return {
        source: fmt.unpack({local: tensors[i] for local, tensors in outputs.items()}, task.scheme)
        for i, source in enumerate(task.sources)
    }


def parts(task: Task, output: torch.Tensor) -> Sequence[torch.Tensor]:
    """An output's share of each of the task's sources."""
    return [output] if len(task.sources) == 1 else list(output)


@dataclass(frozen=True)
class Produce:
    """A task's outputs: quantized, or passed through. With the result of a block, what a calibrated method made of it;
    else from the source alone, by a method that needs no data."""

    plan: Plan
    source: Source
    fmt: Format
    method: Method
    options: Mapping[str, Any]
    block: BlockResult | None = None
    computed_on: str | None = None
    statistics: Mapping[str, Moments] = field(default_factory=dict)

    def __call__(self, task: Task) -> Produced:
        made = Produced([])
        slabs = in_slabs(task, self.source) if self.block is None else None
        if slabs is not None:
            made.outputs = [Pieces(task.meta, noted(task.name, slabs, made.digests))]
            return made
        pieces = []
        for name in task.sources:
            tensor = self.source.read(name)
            made.digests[name] = digest(tensor)
            if task.scheme is None:
                pieces.append([self._passed(name, tensor)])
            else:
                weight, made.entries[name] = self._quantized(task, name, tensor)
                pieces.append(list(self.fmt.pack(weight, task.scheme).values()))
        made.outputs = stack(pieces)
        return made

    def _quantized(self, task: Task, name: str, tensor: torch.Tensor) -> tuple[Weight, dict[str, Any]]:
        """The weight and its entry in the manifest."""
        assert task.scheme is not None
        if self.block is not None and name in self.block.layers:
            done = self.block.layers[name]
            # Of the source's weight, whatever the method folded into it before.
            entry = record(
                task,
                done.method,
                weight_error(tensor, done.weight),
                output_error=done.output_error,
                calibration_tokens=self.block.tokens.get(name),
                fallback=done.fallback,
                computed_on=self.computed_on,
            )
            return done.weight, entry
        kept = self._repacked(name, task.scheme)
        if kept is not None:
            return kept, record(task, "repacked", weight_error(tensor, kept))
        try:
            moments = self.statistics.get(name)
            if self.method.needs and moments is None:  # of no decoder block: the head
                (done,) = METHODS["rtn"].quantize([tensor], None, [task.scheme])
            else:
                (done,) = self.method.quantize([tensor], moments, [task.scheme], **self.options)
        except QkitError as e:
            raise QkitError(f"{name}: {e.message}", e.hint) from e
        error = weight_error(tensor, done.weight) if done.weight_error is None else done.weight_error
        tokens = None if moments is None else moments.tokens
        return done.weight, record(task, done.method, error, calibration_tokens=tokens, fallback=done.fallback)

    def _repacked(self, name: str, scheme: LayerSpec) -> Weight | None:
        """The codes that the source stores, where they are on the grid that is wanted."""
        from ..formats.expanded import Expanded, repacked, same_grid
        from ..sources.types import found_in

        source = found_in(self.source, Expanded)
        if source is None or name not in source.schemes or not same_grid(source.schemes[name], scheme):
            return None
        try:
            return repacked(source.weight(name), scheme)
        except QkitError as error:
            raise QkitError(f"{name}: {error.message}", error.hint) from error

    def _passed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or what the method put in its place. Raises QkitError for NaN or infinity in the source."""
        check_finite(name, tensor)
        return tensor if self.block is None else self.block.replaced.get(name, tensor)


def stack(pieces: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The outputs of each source -> those of the task."""
    import torch

    return pieces[0] if len(pieces) == 1 else [torch.stack(same) for same in zip(*pieces, strict=True)]


@dataclass
class Written:
    """A file of weights that is there, and what the manifest is to say of it: entries of quantized weights and digests
    of source tensors, by name."""

    file: FileDigest
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def make_shard(
    shard: Shard, produce: Produce, store: Store, executor: Executor, advance: Callable[[int], None]
) -> Written:
    """Write one file. advance: called with the source bytes of each task that is done."""
    entries: dict[str, dict[str, Any]] = {}
    made_of: list[Produced] = []

    def stream() -> Iterator[torch.Tensor | Pieces]:
        for task, made in zip(shard.tasks, executor.run(produce, shard.tasks), strict=True):
            made_of.append(made)
            yield from made.outputs
            made.outputs = ()  # or they would live until the next task is done
            advance(task.bytes_in)

    file = CONTAINERS[produce.fmt.container].write(produce.plan, store, shard, stream())
    digests: dict[str, str] = {}
    for made in made_of:  # digests of what comes in pieces are there once it has been written
        entries.update(made.entries)
        digests.update(made.digests)
    return Written(file, entries, digests)


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
    shard: Shard, produce: Produce, work: Workspace, executor: Executor, advance: Callable[[int], None]
) -> None:
    commit(shard, make_shard(shard, produce, work.store, executor, advance), work)


def commit(shard: Shard, written: Written, work: Workspace) -> None:
    """Note a file in the manifest: it is finished."""
    from ..storage.manifest import file_entry

    work.manifest.tensors.update(written.entries)
    work.manifest.sources.update(written.digests)
    work.manifest.files[shard.file] = file_entry(written.file)
    work.manifest.save(work.folder)
