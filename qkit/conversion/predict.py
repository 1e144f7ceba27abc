"""What a conversion will take: workers, memory and time, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..hardware import memory
from ..hardware.detect import LocalDevice, cores
from ..methods import METHODS
from ..models.families import BLOCK
from ..models.skeleton import import_code
from ..text.tokenizer import held
from .executor import AHEAD
from .options import Options
from .tasks import SLAB_BYTES, Shard, Task, block_schemes, row_ranges

if TYPE_CHECKING:
    from ..calibrate.cost import Calibration
    from ..formats.base import Format
    from ..methods import Method
    from ..sources.types import Source

# What becomes resident before a tensor is read, beside what already is: the code that works on tensors and, for
# calibrated methods, tokenizer and model. And what malloc keeps of freed tensors that are too small (32 MiB) to be
# given back at once. Measured by `benchmarks/convert_memory.py`, whose table stands in the README.
BASE_MEMORY, BASE_MEMORY_CALIBRATED = 22 << 20, 40 << 20
RETAINED = 290 << 20
# What malloc comes to keep between slabs of rows, the more the longer it goes on: `benchmarks/large_models.py`.
KEPT = 48 << 20
DEVICE_BASE = 1 << 30  # of a GPU's memory: the driver's context and what libraries take. An assumption, not measured
MARGIN = 1.15  # measured peaks are within this of predicted ones, so a limit has to leave that much
# Source bytes per second of one core in the data-free path (read, quantize, pack, hash, write), measured by
# `benchmarks/convert_speed.py` on 2 Zen 5 cores and halved: a prediction had better be kept than beaten.
RTN_BYTES_PER_CORE_S = 0.4e9


@dataclass(frozen=True)
class Prediction:
    """workers: tasks at a time; peak: resident bytes of the process; seconds; waiting: bytes of activations that
    calibration may hold to save passes; scratch: bytes of temporary files; on_device: bytes of a GPU's memory."""

    workers: int
    peak: int
    seconds: float
    waiting: int = 0
    scratch: int = 0
    on_device: int = 0


def predict(
    source: Source,
    shards: Sequence[Shard],
    fmt: Format,
    method: Method,
    options: Options,
    device: LocalDevice,
    observed: bool = False,
    transfers: Callable[[int], int] = lambda workers: 0,
) -> Prediction:
    """What writing the files will take. observed: the calibration text runs through the model as it is, for any method;
    transfers: (workers) -> bytes that are on their way over a network at once.

    Raises QkitError where --max-memory or the machine cannot hold it."""
    # Imported for their share of what is resident: of the same libraries each machine maps another part.
    import torch  # noqa: F401

    if method.needs or observed:
        import_code(source.config)
    here = memory.limit()
    limit = min(options.max_memory or here, here)
    base = memory.resident() + (BASE_MEMORY_CALIBRATED if method.needs or observed else BASE_MEMORY)
    if method.needs or observed:
        base += held(source)
    tasks = [task for shard in shards for task in shard.tasks]
    usable = cores()
    workers = usable
    sizes = [_sizes(shard, source, fmt, method) for shard in shards]
    in_flight = _in_flight(sizes, workers)
    while workers > 1 and MARGIN * (base + transfers(workers) + in_flight) > limit:
        workers -= 1
        in_flight = _in_flight(sizes, workers)
    base += transfers(workers)
    kept = min(KEPT, sum(task.bytes_in for task in tasks) // 256)
    peak = base + max(in_flight + kept, _verifying(tasks, source, fmt, method) if options.verify else 0)
    seconds = 2.0 + sum(t.bytes_in for t in tasks) / (RTN_BYTES_PER_CORE_S * min(usable, workers))
    passes: list[tuple[Method, Collection[str]]] = [(method, block_schemes(tasks))] if method.needs else []
    if observed:
        matrices = [n for t in tasks for n in t.sources if BLOCK.search(n) and len(t.meta.shape) == 2]
        passes.append((METHODS["rtn"], matrices))
    scratch = waiting = on_device = 0
    if passes:
        from ..calibrate.cost import WAITING_BYTES, predict_cost

        def cost_of(waiting: int) -> list[Calibration]:
            samples, length = options.calib_samples, options.calib_len
            return [predict_cost(source, names, samples, length, each, waiting) for each, names in passes]

        apart = device.device_class == "gpu"

        # Where a cluster calibrates, what is left for this process are hidden states and a block's results.
        spread = options.ray is not None and method.needs is not None and not method.observes

        def resident(costs: Sequence[Calibration]) -> int:
            taken = [cost.spread if spread else cost.host if apart else cost.nbytes for cost in costs]
            return max(base + nbytes + min(3 * nbytes // 10, RETAINED) for nbytes in taken)

        def there(costs: Sequence[Calibration]) -> int:
            return DEVICE_BASE + max(cost.device for cost in costs) if apart else 0

        waiting = WAITING_BYTES
        costs = cost_of(waiting)
        if MARGIN * max(peak, resident(costs)) > limit or MARGIN * there(costs) > device.available_bytes:
            waiting = 0
            costs = cost_of(waiting)
        peak, on_device = max(peak, resident(costs)), there(costs)
        scratch = max(cost.scratch for cost in costs)
        seconds += sum(6.0 + cost.flops / _matmul_rate(device.id) for cost in costs)
    if MARGIN * peak > limit:
        allowed = "--max-memory allows" if limit < here else "this process can have"
        raise QkitError(
            f"about {units.size(peak)} of memory are needed (predicted, 15 % more at most); {allowed} "
            f"{units.size(limit)}",
            "use --method rtn, fewer or shorter calibration samples, or a machine with more memory"
            if passes
            else "raise --max-memory: the largest tensor has to fit",
        )
    if MARGIN * on_device > device.available_bytes:
        raise QkitError(
            f"about {units.size(on_device)} of the memory of {device.id} ({device.name}) are needed (predicted); "
            f"{units.size(device.available_bytes)} are free there",
            "use --device cpu, --method rtn, or a GPU with more memory",
        )
    return Prediction(workers, peak, seconds, waiting, scratch, on_device)


# What a worker of a cluster holds before it reads a tensor: Python with Ray, torch and what conversion loads. Measured
# (resident, demo model and a small Llama, Ray 2.60, torch 2.13).
WORKER_MEMORY = 450 << 20


def worker_memory(source: Source, shards: Sequence[Shard], fmt: Format, method: Method, workers: int) -> int:
    """Resident bytes, margin included, of a process that does nothing but write one of `shards` at a time, `workers`
    tasks at once."""
    sizes = [_sizes(shard, source, fmt, method) for shard in shards]
    return int(MARGIN * (WORKER_MEMORY + _in_flight(sizes, workers)))


PART_BATCHES = 32  # of what a worker of a cluster is given of a text: 256 MiB of its widest inputs
_MODEL_CODE = 190 << 20  # what building a model makes resident: transformers, with the classes of one family


def spread_memory(source: Source, schemes: Collection[str], shape: tuple[int, int], method: Method) -> int:
    """Resident bytes, margin included, of a process that computes one piece of a calibration at a time. shape:
    [samples, length] of the text."""
    from ..calibrate.cost import batch_size, predict_cost

    samples, length = shape
    part = min(samples, PART_BATCHES * batch_size(source, schemes, length, 2))
    inputs = 2 * part * length * max(source.meta(name).shape[1] for name in schemes)
    cost = predict_cost(source, schemes, part, length, method, 0)
    return int(MARGIN * (WORKER_MEMORY + _MODEL_CODE + cost.nbytes + 2 * inputs))


@dataclass(frozen=True)
class _Size:
    """Of a part of a task, in bytes: what computing it takes, what is left of it then, and what of its task is put
    together while it is written."""

    computed: int
    left: int
    joined: int


def _in_flight(sizes: Sequence[Sequence[_Size]], workers: int) -> int:
    """Most bytes alive at once while, file by file, parts of tasks are computed in order, some ahead of their turn."""
    most = 0
    for parts in sizes:
        for i, part in enumerate(parts):
            ahead = parts[i + 1 : i + 1 + AHEAD * workers]
            computing = sorted((each.computed - each.left for each in ahead), reverse=True)[:workers]
            held = part.left + part.joined + sum(each.left for each in ahead) + sum(computing)
            most = max(most, held, part.computed)
    return most


def _verifying(tasks: Sequence[Task], source: Source, fmt: Format, method: Method) -> int:
    """A weight that is read back, by rows where they follow each other in the file, unpacked where its format lays it
    out in another way, and compared in rows."""
    most = 0
    for task in tasks:
        if task.scheme is not None:
            read = task.bytes_out if fmt.rows_follow else 2 * task.bytes_out + task.numel
            if not fmt.rows_follow and task.scheme.bits < 4:  # which are held as four
                read += task.numel // 2
            if fmt.rows_follow and row_ranges(task, source, fmt, method) is not None:
                read = min(read, SLAB_BYTES)
            most = max(most, read + 3 * min(SLAB_BYTES, task.bytes_in))
    return most


def _sizes(shard: Shard, source: Source, fmt: Format, method: Method) -> list[_Size]:
    """A quantized weight has its source, its codes (a byte each) and its packed form alive for a moment."""
    found: list[_Size] = []
    for task in shard.tasks:
        ranges = row_ranges(task, source, fmt, method)
        parts = len(task.sources) if ranges is None else len(ranges)
        # The first output goes to the file as its parts come, where they follow each other there.
        streamed = task.scheme is None or fmt.rows_follow or len(task.sources) > 1
        joined = 0 if parts == 1 else task.bytes_out - (task.outputs[0][1].nbytes if streamed else 0)
        share = 1 / parts if ranges is None else (ranges[0][1] - ranges[0][0]) / task.meta.shape[0]
        left = int(task.bytes_out * share)
        computed = int((task.bytes_in + task.numel) * share) + left if task.scheme else left
        found += [_Size(computed, left, joined)] * parts
    return found


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
