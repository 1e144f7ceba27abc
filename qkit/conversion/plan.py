"""Everything decided before any tensor is read: per tensor scheme, bytes, peak memory, time, and every refusal."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..hardware import memory
from ..hardware.detect import LocalDevice, cores, resolve
from ..models.config import positive_int, text_config
from ..models.families import BLOCK, check_skip, chooser, left_alone, module_of, pick_group_size
from ..models.skeleton import check_architecture
from ..spec import LayerSpec, preset
from ..spec.dtypes import TensorMeta
from ..text.windows import check_spec
from .options import Options
from .workspace import partial_dir

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source, Stored

METHODS = ("rtn", "gptq")
CALIBRATED = ("gptq",)
SHARD_BYTES = 2 * 10**9
# Resident beside weights, activations, statistics: Python, torch and (calibrated) transformers, and what malloc keeps
# between uses. From `qkit convert --json` of the two README models: measured peak less the counted bytes.
BASE_MEMORY = {"rtn": 300 << 20, "gptq": 1200 << 20}
# Source bytes per second of one core in the data-free path (read, quantize, pack, hash, write), measured by
# `benchmarks/convert_speed.py` on 2 Zen 5 cores and halved: a prediction had better be kept than beaten.
RTN_BYTES_PER_CORE_S = 0.4e9


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor: what becomes of it (outputs, in writing order) and why it is left alone, if it is."""

    name: str
    meta: TensorMeta
    scheme: LayerSpec | None
    reason: str
    outputs: tuple[tuple[str, TensorMeta], ...]

    @property
    def bytes_out(self) -> int:
        return sum(meta.nbytes for _, meta in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One output file. block: the decoder block whose tensors alone it holds, None for any others."""

    file: str
    tensors: tuple[TensorPlan, ...]
    block: int | None = None


@dataclass(frozen=True)
class Plan:
    """The whole conversion, decided. Sizes in bytes, time in seconds; `*_predicted` are estimates."""

    source: str
    out: Path
    options: Options
    method: str
    scheme: LayerSpec | None
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]
    device: str
    workers: int
    peak_memory_predicted: int
    seconds_predicted: float
    disk_needed: int
    disk_free: int
    stored: Stored

    @property
    def tensors(self) -> list[TensorPlan]:
        return [t for shard in self.shards for t in shard.tensors]

    @property
    def schemes(self) -> dict[str, LayerSpec]:
        """Weight name -> scheme, for the quantized weights."""
        return {t.name: t.scheme for t in self.tensors if t.scheme is not None}

    @property
    def ignored(self) -> list[str]:
        """Module names of the linears left alone. A tied head is not in the checkpoint, but engines build it as a
        linear, and would look for its packed weight if it were not named here."""
        named = [module_of(t.name) for t in self.tensors if t.scheme is None and is_linear_like(t)]
        return named if "lm_head" in named else [*named, "lm_head"]

    @property
    def bytes_in(self) -> int:
        return sum(t.meta.nbytes for t in self.tensors)

    @property
    def bytes_out(self) -> int:
        return sum(t.bytes_out for t in self.tensors)

    @property
    def sizes(self) -> str:
        """ "269.0 MB -> 113.1 MB"; of a quantized source what it takes on disk beside what it expands to."""
        before = units.size(self.bytes_in)
        if self.stored.quantized:
            before = f"{units.size(self.stored.nbytes)} stored quantized, {before} expanded"
        return f"{before} -> {units.size(self.bytes_out)}"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_out / max(1, sum(t.meta.numel for t in self.tensors))

    @property
    def bits_per_quantized_weight(self) -> float | None:
        done = [t for t in self.tensors if t.scheme is not None]
        return 8 * sum(t.bytes_out for t in done) / sum(t.meta.numel for t in done) if done else None

    def as_dict(self) -> dict[str, Any]:
        """JSON for --dry-run --json."""
        return {
            "source": self.source,
            "out": str(self.out),
            "format": self.options.format,
            "method": self.method,
            "scheme": asdict(self.scheme) if self.scheme else None,
            "bytes_in": self.bytes_in,
            "bytes_stored": self.stored.nbytes,
            "bytes_out": self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "peak_memory_predicted_bytes": self.peak_memory_predicted,
            "seconds_predicted": self.seconds_predicted,
            "disk_needed_bytes": self.disk_needed,
            "disk_free_bytes": self.disk_free,
            "workers": self.workers,
            "notes": list(self.notes),
            "shards": [{"file": s.file, "bytes": sum(t.bytes_out for t in s.tensors)} for s in self.shards],
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.meta.dtype,
                    "shape": list(t.meta.shape),
                    "scheme": t.scheme.describe() if t.scheme else None,
                    "left_alone": t.reason or None,
                    "bytes_out": t.bytes_out,
                }
                for t in self.tensors
            ],
        }


def is_linear_like(t: TensorPlan) -> bool:
    """Whether engines see a linear layer here, so that the config must name it as left alone."""
    return len(t.meta.shape) == 2 and t.name.endswith(".weight") and left_alone(t.name, t.meta) != "embedding"


def model_dtype(config: dict[str, Any]) -> str:
    """The safetensors name of the dtype a config declares, "BF16" where it declares none."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for part in (config, text_config(config)):
        declared = part.get("dtype") or part.get("torch_dtype")
        if declared:
            return names.get(str(declared).removeprefix("torch."), "BF16")
    return "BF16"


def make_plan(source: Source, out: Path, options: Options) -> Plan:
    """Decide everything, or raise QkitError. Reads no tensor and writes nothing."""
    from .. import formats

    device = resolve(options.device)
    fmt = formats.get(options.format)
    base_scheme, method, notes = _settle(options, source)
    if source.stored.quantized:
        notes.append(
            f"the source is itself quantized: {source.stored.describe()}, {units.size(source.stored.nbytes)} stored; "
            "its values are expanded, and what it lost before is lost in the result too"
        )
    check_blocks(source)
    names = source.names()
    check_skip(options.skip, names)

    choose = chooser(base_scheme, options.skip)
    chosen = {name: choose(name, source.meta(name)) for name in names}
    scheme, chosen = _settle_group(base_scheme, options, source, fmt, chosen, notes)

    tensors = []
    for name in names:
        meta, pick = source.meta(name), chosen[name]
        if isinstance(pick, LayerSpec):
            shape = (meta.shape[0], meta.shape[1])
            metas = fmt.out_metas(shape, pick)
            prefix = module_of(name)
            outputs = tuple((f"{prefix}.{local}", m) for local, m in metas.items())
            tensors.append(TensorPlan(name, meta, pick, "", outputs))
        else:
            tensors.append(TensorPlan(name, meta, None, pick, ((name, meta),)))
    if scheme is not None and not any(t.scheme for t in tensors):
        raise QkitError("no tensor of this checkpoint would be quantized", "check --skip, or use --scheme none")
    _check_collisions(tensors)

    shards = make_shards(tensors, by_block=method in CALIBRATED)
    workers, peak, seconds = _predict(source, tensors, method, options, device)
    needed = sum(t.bytes_out for t in tensors) + sum(_sidecar_sizes(source)) + (16 << 20)
    free = _free_disk(out)
    partial = partial_dir(out)
    reusable = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) if partial.is_dir() else 0
    if needed > free + reusable:
        raise QkitError(
            f"{out} needs {units.size(needed)}, and {units.size(free + reusable)} are free there",
            "free some space or choose another disk with -o",
        )
    return Plan(
        source.label,
        out,
        options,
        method,
        scheme,
        shards,
        tuple(notes),
        device.id,
        workers,
        peak,
        seconds,
        needed,
        free,
        source.stored,
    )


def _settle(options: Options, source: Source) -> tuple[LayerSpec | None, str, list[str]]:
    """LayerSpec and method, with the defaults said."""
    notes: list[str] = []
    scheme = preset("none" if options.format == "safetensors" and options.scheme == "w4a16" else options.scheme)
    if (scheme is None) != (options.format == "safetensors"):
        raise QkitError(
            f"--format {options.format} and --scheme {options.scheme} do not go together",
            "--format safetensors exports without quantizing (--scheme none); the other formats hold w4a16 or w8a16",
        )
    if source.config.get("quantization_config"):
        raise QkitError(
            f"{source.label} is already quantized ({_quantization(source.config)})",
            "convert from the original checkpoint; quantizing twice adds the errors up",
        )
    if source.config.get("model_type") in ("gpt2", "gptj", "codegen"):
        raise QkitError(
            f"{source.config['model_type']} checkpoints store transposed or fused linears that qkit does not quantize",
            "use a llama, mistral, qwen or gemma family model",
        )
    method = options.method
    if scheme is None:
        method = "rtn"
    elif method is None:
        method = "gptq" if scheme.bits < 8 else "rtn"
        notes.append(f"method {method} (the default at {scheme.bits} bits)")
    if method not in METHODS:
        raise QkitError(f"unknown method {method!r}", "known methods: " + ", ".join(METHODS))
    if method in CALIBRATED:
        check_architecture(source.config)
        check_spec(options.calib)
        longest = positive_int(text_config(source.config), "max_position_embeddings", 1 << 30)
        if options.calib_len > longest:
            raise QkitError(
                f"--calib-len {options.calib_len} is longer than the {longest} tokens the model takes",
                f"use --calib-len {longest} or less",
            )
    if options.clip_search and method != "rtn":
        raise QkitError("--clip-search belongs to --method rtn", "gptq always searches its scales")
    if method not in CALIBRATED and options.calib is not None:
        raise QkitError(f"--calib is not used by method {method}", "drop it, or use --method gptq")
    return scheme, method, notes


def _quantization(config: Mapping[str, Any]) -> str:
    given = config["quantization_config"]
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return str(method or "unknown method")


def _settle_group(
    scheme: LayerSpec | None,
    options: Options,
    source: Source,
    fmt: Format,
    chosen: dict[str, LayerSpec | str],
    notes: list[str],
) -> tuple[LayerSpec | None, dict[str, LayerSpec | str]]:
    """Fill in the group size and what the format dictates; refuse what it cannot hold."""
    if scheme is None:
        return None, chosen
    shapes = {n: source.meta(n).shape for n, pick in chosen.items() if isinstance(pick, LayerSpec)}
    if not shapes:
        return scheme, chosen
    scheme = pick_group_size(scheme, options.group_size, shapes)
    if options.group_size is None:
        notes.append(f"group size {scheme.group_size} (the largest of 128, 64, 32 that divides every layer)")
    scheme = fmt.scheme_for(scheme, model_dtype(source.config))
    for name, shape in shapes.items():
        problem = fmt.check((shape[0], shape[1]), scheme)
        if problem:
            raise QkitError(f"{name}: {problem}", "use another --format, or leave the layer alone with --skip")
    return scheme, {n: scheme if isinstance(pick, LayerSpec) else pick for n, pick in chosen.items()}


def check_blocks(source: Source) -> None:
    """Refuse a checkpoint whose decoder blocks are not all there."""
    text = text_config(source.config)
    expected = text.get("num_hidden_layers")
    found = {int(m[1]) for n in source.names() if "vision" not in n and (m := BLOCK.search(n))}
    if not isinstance(expected, int) or not found:
        return
    missing = sorted(set(range(expected)) - found)
    if missing:
        raise QkitError(
            f"{source.label}: config.json says {expected} decoder blocks, "
            f"but tensors of block {', '.join(map(str, missing[:5]))}{' ...' if len(missing) > 5 else ''} are missing",
            "the download may be incomplete: fetch the checkpoint again",
        )


def _check_collisions(tensors: Iterable[TensorPlan]) -> None:
    seen = Counter(name for t in tensors for name, _ in t.outputs)
    twice = [name for name, n in seen.items() if n > 1]
    if twice:
        raise QkitError(f"the output would hold {twice[0]} twice", "the source has clashing tensor names")


def make_shards(tensors: Iterable[TensorPlan], limit: int = SHARD_BYTES, by_block: bool = False) -> tuple[Shard, ...]:
    """Split in order into files of at most `limit` bytes (one tensor may exceed it).

    by_block: each decoder block with quantized tensors has files of its own, after everything else: what a calibrated
    method has finished is then a finished file."""
    tensors = list(tensors)
    decoders = {m.string[: m.start(1)] for t in tensors if t.scheme and (m := BLOCK.search(t.name))}

    def block(t: TensorPlan) -> int | None:
        m = BLOCK.search(t.name) if by_block else None
        return int(m[1]) if m and t.name[: m.start(1)] in decoders else None

    if by_block:
        tensors.sort(key=lambda t: -1 if (b := block(t)) is None else b)
    groups: list[tuple[int | None, list[TensorPlan]]] = []
    used = 0
    for t in tensors:
        if not groups or groups[-1][0] != block(t) or used + t.bytes_out > limit:
            groups.append((block(t), []))
            used = 0
        groups[-1][1].append(t)
        used += t.bytes_out
    n = max(1, len(groups))
    names = (f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1))
    return tuple(Shard(name, tuple(own), index) for name, (index, own) in zip(names, groups, strict=False))


def _predict(
    source: Source, tensors: list[TensorPlan], method: str, options: Options, device: LocalDevice
) -> tuple[int, int, float]:
    """(workers, peak bytes, seconds). Refuses what --max-memory or the machine cannot hold."""
    here = memory.limit()
    limit = min(options.max_memory or here, here)
    base = BASE_MEMORY[method]
    usable = cores()
    workers = usable
    while workers > 1 and base + _in_flight(tensors, workers) > limit:
        workers -= 1
    peak = base + _in_flight(tensors, workers)
    seconds = 2.0 + sum(t.meta.nbytes for t in tensors) / (RTN_BYTES_PER_CORE_S * min(usable, workers))
    if method in CALIBRATED:
        from ..calibrate import blocks

        schemes = {t.name: t.scheme for t in tensors if t.scheme is not None}
        cost = blocks.predict_cost(source, schemes, options.calib_samples, options.calib_len)
        peak = max(peak, base + cost.peak_bytes)
        seconds += 6.0 + cost.flops / _matmul_rate(device.id)
    if peak > limit:
        allowed = "--max-memory allows" if limit < here else "this process can have"
        raise QkitError(
            f"about {units.size(peak)} of memory are needed (predicted); {allowed} {units.size(limit)}",
            "use --method rtn, fewer or shorter calibration samples, or a machine with more memory"
            if method in CALIBRATED
            else "raise --max-memory: the largest tensor has to fit",
        )
    return workers, peak, seconds


def _in_flight(tensors: list[TensorPlan], workers: int) -> int:
    """Most bytes alive at once while `workers` produce tensors in order and one more is being written.

    A quantized weight has its source, its codes (a byte each) and its packed form alive for a moment."""
    held = [t.meta.nbytes + t.meta.numel + t.bytes_out if t.scheme else t.meta.nbytes for t in tensors]
    return max((sum(held[i : i + workers + 1]) for i in range(len(held))), default=0)


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


def _sidecar_sizes(source: Source) -> Iterable[int]:
    for sidecar in source.sidecars:
        yield len(sidecar.data) if isinstance(sidecar.data, bytes) else sidecar.data.stat().st_size


def _free_disk(out: Path) -> int:
    """Free bytes where `out` will lie. Raises QkitError where nothing can be written there."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise QkitError(f"cannot write into {parent}", "choose another output folder with -o")
    return shutil.disk_usage(parent).free


def describe(plan: Plan) -> str:
    """The plan as text, a line per kind of tensor and per group of equal tensors."""
    lines = [f"source   {plan.source}", f"output   {plan.out} ({plan.options.format})"]
    what = plan.scheme.describe() if plan.scheme else "unquantized export"
    lines.append(f"scheme   {what}" + (f", method {plan.method}" if plan.scheme else ""))
    lines += [f"         {note}" for note in plan.notes]
    lines.append("")
    for t in plan.tensors:
        shape = " x ".join(map(str, t.meta.shape))
        lines.append(f"  {t.name:<56} {t.meta.dtype:>4} {shape:>15}  {t.scheme.describe() if t.scheme else t.reason}")
    lines.append("")
    counts = Counter(t.scheme.describe() if t.scheme else f"left alone: {t.reason}" for t in plan.tensors)
    lines += [f"{n:6d} tensors  {kind}" for kind, n in counts.most_common()]
    lines.append("")
    per_quantized = plan.bits_per_quantized_weight
    lines.append(
        f"size     {plan.sizes} in {len(plan.shards)} file(s), "
        f"{plan.bits_per_weight:.2f} bits per weight"
        + (f" ({per_quantized:.2f} in the quantized layers)" if per_quantized else "")
    )
    lines.append(f"disk     {units.size(plan.disk_needed)} needed, {units.size(plan.disk_free)} free")
    lines.append(
        f"predicted: peak memory {units.size(plan.peak_memory_predicted)}, "
        f"time {units.duration(plan.seconds_predicted)}"
    )
    return "\n".join(lines)
