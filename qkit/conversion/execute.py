"""Plan -> files: every tensor read, quantized, packed and written; a finished decoder block is a finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import QkitError
from ..models.families import module_of
from ..progress import track

if TYPE_CHECKING:
    import torch

    from ..calibrate.block import LayerResult
    from ..formats.base import Format
    from ..kernels.weight import Weight
    from ..sources.types import Source
    from .plan import Plan, Shard, TensorPlan
    from .workspace import Workspace

    # A tensor's outputs, in writing order, and its entry in the manifest (None where it is not quantized).
    Produced = tuple[list[torch.Tensor], dict[str, Any] | None]

_SLAB = 1 << 24  # weights compared at a time: 128 MiB in float64


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


def write_weights(
    plan: Plan,
    source: Source,
    fmt: Format,
    work: Workspace,
    executor: Executor,
    tokens: torch.Tensor | None,
    device: str,
) -> None:
    """Write every file of weights that is not there yet. tokens: calibration windows, None for data-free methods."""
    convert_one = _Direct(source, fmt, plan)
    if tokens is not None:
        _write_blocks(plan, source, fmt, work, tokens, device, convert_one)
    with track("writing", plan.bytes_in, "bytes") as advance:
        for shard in plan.shards:
            if work.has(shard.file):
                advance(sum(t.meta.nbytes for t in shard.tensors))
            else:
                _write_shard(shard, convert_one, work, executor, advance)


def _write_blocks(
    plan: Plan,
    source: Source,
    fmt: Format,
    work: Workspace,
    tokens: torch.Tensor,
    device: str,
    convert_one: Callable[[TensorPlan], Produced],
) -> None:
    """Run the calibrated method over the decoder blocks; each goes to its file as soon as it is quantized."""
    from ..calibrate.blocks import quantize_blocks
    from ..progress import notify

    shards: dict[int, list[Shard]] = {}
    for shard in plan.shards:
        if shard.block is not None:
            shards.setdefault(shard.block, []).append(shard)
    if all(work.has(shard.file) for own in shards.values() for shard in own):
        return

    def finished(index: int) -> Mapping[str, Weight] | None:
        own = shards.get(index, [])
        return _read_back(own, fmt, work) if own and all(work.has(s.file) for s in own) else None

    with track(plan.method, len(shards), "blocks") as advance:
        for result in quantize_blocks(source, plan.schemes, tokens, device=device, done=finished):
            for name, layer in result.layers.items():
                if layer.fallback:
                    notify(f"WARNING: {name} fell back to rounding: {layer.fallback}")
            if result.layers:
                produce = _Calibrated(source, fmt, result.layers, convert_one, device)
                for shard in shards[result.index]:
                    _write_shard(shard, produce, work, Threads(1), lambda amount: None)
            advance(1)


def _read_back(shards: list[Shard], fmt: Format, work: Workspace) -> dict[str, Weight]:
    """A finished block's quantized weights, for the forward pass of a resumed run."""
    from ..storage.safetensors import SafetensorsFile

    weights = {}
    for shard in shards:
        file = SafetensorsFile(work.folder / shard.file)
        for t in shard.tensors:
            if t.scheme is not None:
                prefix = module_of(t.name) + "."
                tensors = {name.removeprefix(prefix): file.read(name) for name, _ in t.outputs}
                weights[t.name] = fmt.unpack(tensors, t.scheme)
        file.close()
    return weights


class _Direct:
    """A tensor's outputs from the source alone: quantized by rounding, or passed through."""

    def __init__(self, source: Source, fmt: Format, plan: Plan):
        self.source, self.fmt, self.clip_search = source, fmt, plan.options.clip_search

    def __call__(self, t: TensorPlan) -> Produced:
        from ..methods import rtn

        weight = self.source.read(t.name)
        if t.scheme is None:
            check_finite(t.name, weight)
            return [weight], None
        try:
            q, error = rtn.quantize_with_error(weight, t.scheme, self.clip_search)
        except QkitError as e:
            raise QkitError(f"{t.name}: {e.message}", e.hint) from e
        return list(self.fmt.pack(q).values()), record(t, "rtn", error)


class _Calibrated:
    """A tensor's outputs from a block's results; what the method left alone passes through."""

    def __init__(
        self,
        source: Source,
        fmt: Format,
        layers: Mapping[str, LayerResult],
        convert_one: Callable[[TensorPlan], Produced],
        device: str,
    ):
        self.source, self.fmt, self.layers, self.convert_one = source, fmt, layers, convert_one
        self.computed_on = computed_on(device)

    def __call__(self, t: TensorPlan) -> Produced:
        layer = self.layers.get(t.name)
        if layer is None:
            return self.convert_one(t)
        entry = record(
            t,
            layer.method,
            weight_error(self.source.read(t.name), layer.weight),
            output_error=layer.error,
            fallback=layer.fallback,
            computed_on=self.computed_on,
        )
        return list(self.fmt.pack(layer.weight).values()), entry


def computed_on(device: str) -> str:
    """What a calibrated result's last bits depend on: the order of sums changes with it ("cpu avx512, 2 threads")."""
    import torch

    from ..kernels import backend

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, kernels {backend()}, {torch.get_num_threads()} threads"


def record(t: TensorPlan, method: str, weight_error: float, **more: Any) -> dict[str, Any]:
    """The manifest's entry for a quantized weight. weight_error: ||W - Wq|| / ||W||, Frobenius."""
    assert t.scheme is not None
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in more.items() if v is not None}
    return {
        "scheme": asdict(t.scheme),
        "method": method,
        "shape": list(t.meta.shape),
        "weight_error": float(f"{weight_error:.6g}"),
        **rounded,
    }


def weight_error(weight: torch.Tensor, q: Weight) -> float:
    """||W - Wq|| / ||W||, Frobenius, accumulated in float64, a slab of rows at a time: no whole copy is made."""
    from ..kernels.codes import values_of

    lost = total = 0.0
    step = max(1, _SLAB // max(1, weight.shape[1]))
    for a in range(0, weight.shape[0], step):
        w = weight[a : a + step].double()
        total += float(w.square().sum())
        lost += float((w - values_of(q.rows(a, a + step)).double()).square_().sum())
    return float((lost / total) ** 0.5) if total else 0.0


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises QkitError naming the tensor where it holds NaN or infinity."""
    import torch

    if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN wins both, infinity one; unlike isfinite it makes no copy
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            hint = "the checkpoint is damaged: fetch or train it again"
            raise QkitError(f"{name} contains NaN or infinite values", hint)


def _write_shard(
    shard: Shard, produce: Callable[[TensorPlan], Produced], work: Workspace, executor: Executor, advance: Any
) -> None:
    from ..storage.manifest import file_entry
    from ..storage.writer import write_safetensors

    entries = [output for t in shard.tensors for output in t.outputs]
    records: dict[str, dict[str, Any]] = {}

    def stream() -> Iterator[torch.Tensor]:
        for t, (tensors, entry) in zip(shard.tensors, executor.run(produce, shard.tensors), strict=True):
            if entry is not None:
                records[t.name] = entry
            yield from tensors
            advance(t.meta.nbytes)

    digest = write_safetensors(work.folder / shard.file, entries, stream())
    work.manifest.tensors.update(records)
    work.manifest.files[shard.file] = file_entry(digest)
    work.manifest.save(work.folder)
