"""What a conversion will take: workers, memory and time, before it begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..hardware import memory
from ..hardware.detect import LocalDevice, cores
from ..methods import METHODS
from ..models.families import BLOCK
from ..text.tokenizer import held
from .options import Options
from .tasks import SLAB_BYTES, Shard, Task, block_schemes, in_slabs

if TYPE_CHECKING:
    from ..methods import Method
    from ..sources.types import Source

# What is resident before a tensor is read, beside Python and torch, of which each installation maps another part of its
# libraries: what conversion loads; for calibrated methods transformers and a tokenizer as well. And what malloc keeps
# of freed tensors that are too small (32 MiB) to be given back at once. Measured by `benchmarks/convert_memory.py`,
# whose table stands in the README.
BASE_MEMORY, BASE_MEMORY_CALIBRATED = 22 << 20, 214 << 20
RETAINED = 290 << 20
MARGIN = 1.15  # measured peaks are within this of predicted ones, so a limit has to leave that much
# Source bytes per second of one core in the data-free path (read, quantize, pack, hash, write), measured by
# `benchmarks/convert_speed.py` on 2 Zen 5 cores and halved: a prediction had better be kept than beaten.
RTN_BYTES_PER_CORE_S = 0.4e9


@dataclass(frozen=True)
class Prediction:
    """workers: tasks at a time; peak: resident bytes of the process; seconds."""

    workers: int
    peak: int
    seconds: float


def predict(
    source: Source,
    shards: Sequence[Shard],
    method: Method,
    options: Options,
    device: LocalDevice,
    observed: bool = False,
) -> Prediction:
    """What writing the files will take. observed: the calibration text runs through the model as it is, for any method.

    Raises QkitError where --max-memory or the machine cannot hold it."""
    import torch  # noqa: F401  for its share of what is resident

    here = memory.limit()
    limit = min(options.max_memory or here, here)
    base = memory.resident() + (BASE_MEMORY_CALIBRATED if method.needs or observed else BASE_MEMORY)
    if method.needs or observed:
        base += held(source)
    tasks = [task for shard in shards for task in shard.tasks]
    usable = cores()
    workers = usable
    while workers > 1 and MARGIN * (base + _in_flight(source, shards, workers)) > limit:
        workers -= 1
    peak = base + _in_flight(source, shards, workers)
    seconds = 2.0 + sum(t.bytes_in for t in tasks) / (RTN_BYTES_PER_CORE_S * min(usable, workers))
    passes: list[tuple[Method, Collection[str]]] = [(method, block_schemes(tasks))] if method.needs else []
    if observed:
        matrices = [n for t in tasks for n in t.sources if BLOCK.search(n) and len(t.meta.shape) == 2]
        passes.append((METHODS["rtn"], matrices))
    for each, names in passes:
        from ..calibrate import blocks

        cost = blocks.predict_cost(source, names, options.calib_samples, options.calib_len, each)
        peak = max(peak, base + cost.nbytes + min(3 * cost.nbytes // 2, RETAINED))
        seconds += 6.0 + cost.flops / _matmul_rate(device.id)
    if MARGIN * peak > limit:
        allowed = "--max-memory allows" if limit < here else "this process can have"
        raise QkitError(
            f"about {units.size(peak)} of memory are needed (predicted, 15 % more at most); {allowed} "
            f"{units.size(limit)}",
            "use --method rtn, fewer or shorter calibration samples, or a machine with more memory"
            if passes
            else "raise --max-memory: the largest tensor has to fit",
        )
    return Prediction(workers, peak, seconds)


# What a worker of a cluster holds before it reads a tensor: Python with Ray, torch and what conversion loads. Measured
# (resident, demo model and a small Llama, Ray 2.60, torch 2.13).
WORKER_MEMORY = 450 << 20


def worker_memory(source: Source, shards: Sequence[Shard], workers: int) -> int:
    """Resident bytes, margin included, of a process that does nothing but write one of `shards` at a time, `workers`
    tasks at once."""
    return int(MARGIN * (WORKER_MEMORY + _in_flight(source, shards, workers)))


def _in_flight(source: Source, shards: Sequence[Shard], workers: int) -> int:
    """Most bytes alive at once while, file by file, `workers` tasks run in order, the first of them being written.

    A quantized weight has its source, its codes (a byte each) and its packed form alive for a moment."""
    most = 0
    for shard in shards:
        # Of each task: what it holds ahead of its turn, and while it is written. Slabs are read as they are written.
        held = [(0, SLAB_BYTES) if in_slabs(task, source) else 2 * (_held(task),) for task in shard.tasks]
        for i, (_, now) in enumerate(held):
            most = max(most, now + sum(ahead for ahead, _ in held[i + 1 : i + workers]))
    return most


def _held(task: Task) -> int:
    return task.bytes_in + task.numel + task.bytes_out if task.scheme else task.bytes_in


def _matmul_rate(device: str) -> float:
    """FLOP/s of a float32 matmul of the kind GPTQ spends its time in, from a probe of a few milliseconds."""
    import time

    import torch

    a = torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
