"""Plan -> files: every tensor read, quantized, packed and written; a finished decoder block is a finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..progress import notify, track
from .executor import Executor
from .record import check_finite, computed_on, digest, record, weight_error

if TYPE_CHECKING:
    import torch

    from ..calibrate.block import BlockResult
    from ..formats.base import Format
    from ..kernels.weight import Weight
    from ..methods import Method
    from ..sources.types import Source
    from .plan import Plan
    from .tasks import Shard, Task
    from .workspace import Workspace


@dataclass
class Produced:
    """What a task gave: its outputs in writing order; entries of the manifest by name of the weight, for quantized
    ones; digests of the source tensors by name."""

    outputs: Sequence[torch.Tensor]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def write_weights(
    plan: Plan, source: Source, fmt: Format, work: Workspace, executor: Executor, tokens: torch.Tensor | None
) -> None:
    """Write every file of weights that is not there yet. tokens: calibration windows, None for data-free methods."""
    options = {name: getattr(plan.options, name) for name in plan.method.options}
    direct = Direct(source, fmt, plan.method, options)
    # First what belongs to no block, the embeddings among it: the largest tensors, before any statistics are held.
    _write_shards([s for s in plan.shards if tokens is None or s.block is None], direct, work, executor)
    if tokens is not None:
        _write_blocks(plan, source, fmt, work, executor, tokens, direct, options)
        _write_shards(plan.shards, direct, work, executor)  # blocks of which nothing is quantized


def _write_shards(shards: Sequence[Shard], direct: Direct, work: Workspace, executor: Executor) -> None:
    left = [shard for shard in shards if not work.has(shard.file)]
    if left:
        with track("writing", sum(t.bytes_in for shard in left for t in shard.tasks), "bytes") as advance:
            for shard in left:
                _write_shard(shard, direct, work, executor, advance)


def _write_blocks(
    plan: Plan,
    source: Source,
    fmt: Format,
    work: Workspace,
    executor: Executor,
    tokens: torch.Tensor,
    direct: Direct,
    options: Mapping[str, Any],
) -> None:
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
        return _finished_block(own, fmt, work, replaced=plan.method.prepares)

    with track(plan.method.name, len(shards), "blocks") as advance:
        for result in quantize_blocks(
            source, plan.schemes, tokens, plan.method, device=plan.device, done=finished, **options
        ):
            for name, layer in result.layers.items():
                if layer.fallback:
                    notify(f"WARNING: {name} fell back to rounding: {layer.fallback}")
            if result.layers:
                produce = Calibrated(direct, result, plan.device)
                for shard in shards[result.index]:
                    _write_shard(shard, produce, work, executor, lambda amount: None)
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
            elif replaced:
                found |= zip(task.sources, parts(task, file.read(task.outputs[0][0])), strict=True)
        file.close()
    return found


def read_weights(task: Task, fmt: Format, read: Callable[[str], torch.Tensor]) -> dict[str, Weight]:
    """Source name -> weight, from a quantized task's outputs as they were written. read: (name) -> tensor."""
    assert task.scheme is not None
    outputs = {name.rpartition(".")[2]: parts(task, read(name)) for name, _ in task.outputs}
    return {
        source: fmt.unpack({local: tensors[i] for local, tensors in outputs.items()}, task.scheme)
        for i, source in enumerate(task.sources)
    }


def parts(task: Task, output: torch.Tensor) -> Sequence[torch.Tensor]:
    """An output's share of each of the task's sources."""
    return [output] if len(task.sources) == 1 else list(output)


class Direct:
    """A task's outputs from the source alone: quantized by a method that needs no data, or passed through."""

    def __init__(self, source: Source, fmt: Format, method: Method, options: Mapping[str, Any]):
        self.source, self.fmt, self.method, self.options = source, fmt, method, options

    def __call__(self, task: Task) -> Produced:
        made = Produced([])
        pieces = []
        for name in task.sources:
            tensor = self.source.read(name)
            made.digests[name] = digest(tensor)
            if task.scheme is None:
                check_finite(name, tensor)
                pieces.append([tensor])
                continue
            try:
                (result,) = self.method.quantize([tensor], None, [task.scheme], **self.options)
            except QkitError as e:
                raise QkitError(f"{name}: {e.message}", e.hint) from e
            error = result.weight_error
            if error is None:
                error = weight_error(tensor, result.weight)
            made.entries[name] = record(task, result.method, error, fallback=result.fallback)
            pieces.append(list(self.fmt.pack(result.weight).values()))
        made.outputs = stack(pieces)
        return made


class Calibrated:
    """A task's outputs from a block's results; what the method did not touch passes through."""

    def __init__(self, direct: Direct, result: BlockResult, device: str):
        self.direct, self.result = direct, result
        self.computed_on = computed_on(device)

    def __call__(self, task: Task) -> Produced:
        layers, replaced = self.result.layers, self.result.replaced
        if not any(name in layers or name in replaced for name in task.sources):
            return self.direct(task)
        made = Produced([])
        pieces = []
        for name in task.sources:
            original = self.direct.source.read(name)
            made.digests[name] = digest(original)
            layer = layers.get(name)
            if layer is None:
                pieces.append([replaced.get(name, original)])
                continue
            made.entries[name] = record(
                task,
                layer.method,
                weight_error(original, layer.weight),
                output_error=layer.output_error,
                calibration_tokens=self.result.tokens.get(name),
                fallback=layer.fallback,
                computed_on=self.computed_on,
            )
            pieces.append(list(self.direct.fmt.pack(layer.weight).values()))
        made.outputs = stack(pieces)
        return made


def stack(pieces: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The outputs of each source -> those of the task."""
    import torch

    return pieces[0] if len(pieces) == 1 else [torch.stack(same) for same in zip(*pieces, strict=True)]


def _write_shard(
    shard: Shard, produce: Callable[[Task], Produced], work: Workspace, executor: Executor, advance: Any
) -> None:
    from ..storage.manifest import file_entry
    from ..storage.writer import write_safetensors

    entries = [output for t in shard.tasks for output in t.outputs]
    noted: list[Produced] = []

    def stream() -> Iterator[torch.Tensor]:
        for task, made in zip(shard.tasks, executor.run(produce, shard.tasks), strict=True):
            noted.append(Produced([], made.entries, made.digests))
            yield from made.outputs
            made.outputs = ()  # or they would live until the next task is done
            advance(task.bytes_in)

    written = write_safetensors(work.store, shard.file, entries, stream())
    for made in noted:
        work.manifest.tensors.update(made.entries)
        work.manifest.sources.update(made.digests)
    work.manifest.files[shard.file] = file_entry(written)
    work.manifest.save(work.folder)
