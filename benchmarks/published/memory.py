"""Published logs of what engines allocate, read from memory.csv, and what `qkit.estimate` says of the same.

Columns: model; format and scheme (safetensors none: 16 bits); engine; version: of the engine, or the month of the log;
device, devices; total_gib: of a device, where the log says it; utilization; context, batched_tokens, sequences: what
the engine was told, or its default then. Per device, in GiB: weights, activations, other (the log's non-torch memory),
graphs, kv_gib with kv_tokens; compute_mib: llama.cpp's compute buffer; file_gib: of a file. outlier: the parts that
cannot agree, and why.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qkit.estimate.memory import Memory, memory, sizes
from qkit.estimate.parts import Weights
from qkit.estimate.serving import Serving
from qkit.estimate.weights import of_architecture
from qkit.hardware.catalogue import find
from qkit.hardware.device import Device, Target
from qkit.models.architecture import Architecture

from .rows import _architecture

GIB = 1 << 30
MIB = 1 << 20
TABLE = Path(__file__).parent / "memory.csv"
LIMITS = {"weights": 0.03, "file": 0.03, "KV tokens per GiB": 0.03, "compute buffer": 0.03, "total": 0.10}
_SOME = Device("gpu", "GPU", "", "", "gpu", (), 80.0, 80.0, None)  # where a log does not name it


@dataclass(frozen=True)
class Compared:
    """One part of one log, in GiB (tokens per GiB, MiB). limit: None where a part alone need not agree."""

    row: dict[str, str]
    part: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    @property
    def limit(self) -> float | None:
        return LIMITS.get(self.part)

    @property
    def outlier(self) -> str:
        """Why it cannot agree; "" where it can."""
        for reason in self.row["outlier"].split("; "):
            parts, _, why = reason.partition(": ")
            if self.part in parts.split(" and "):
                return why
        return ""

    @property
    def words(self) -> str:
        r = self.row
        where = f"{r['devices']} x {r['device'] or 'a GPU'}"
        return f"{r['model']} {r['format']} {r['scheme']}, {r['engine']} {r['version']}, {where}"


def read(path: Path = TABLE) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def model(name: str, format: str, scheme: str) -> tuple[Architecture, Weights]:
    arch = _architecture(name, 0)[0]
    return arch, of_architecture(arch, None if scheme == "none" else scheme, format)


def compare(rows: Iterable[dict[str, str]]) -> list[Compared]:
    return [found for row in rows for found in _compare(row)]


def sorts(version: str) -> bool:
    """Whether vLLM's sampler sorted logits then: before 0.16, of February 2026."""
    year, dot, minor = version.partition(".")
    return int(minor.partition(".")[0]) < 16 if dot else year < "2026-02"


def _serving(row: dict[str, str]) -> Serving:
    version = row["version"]
    if row["engine"] != "vllm":
        return Serving(ubatch=_int(row["batched_tokens"]) or 512)
    return Serving(
        batched_tokens=_int(row["batched_tokens"]),
        sequences=_int(row["sequences"]),
        utilization=float(row["utilization"] or 0.9),
        sampler_bytes=39 if sorts(version) else 18,
        graphs=not sorts(version) and version >= "0.21",
    )


def _int(text: str) -> int | None:
    return int(text) if text else None


def _compare(row: dict[str, str]) -> Iterable[Compared]:
    def gib(column: str) -> float | None:
        return float(row[column]) if row[column] else None

    arch, weights = model(row["model"], row["format"], row["scheme"])
    device = find(row["device"]) if row["device"] else _SOME
    target, s = Target(device, int(row["devices"])), _serving(row)
    kv_dtype = row["kv_dtype"] or None
    context = _int(row["context"]) or 4096
    expected: Memory = memory(arch, weights, target, row["engine"], context, 1, kv_dtype, s)
    if gib("file_gib"):
        yield Compared(row, "file", gib("file_gib") or 0, weights.total / GIB)
    if gib("weights_gib"):
        yield Compared(row, "weights", gib("weights_gib") or 0, expected.of("weights") / GIB)
    passing = (expected.of("activations") + expected.of("logits")) / GIB
    if gib("activations_gib"):
        yield Compared(row, "activations", gib("activations_gib") or 0, passing)
    for part, column in (("other", "other_gib"), ("CUDA graphs", "graphs_gib")):
        named = {"other": "runtime"}.get(part, part)
        if gib(column) and (expected.of(named) or part == "other"):
            yield Compared(row, part, gib(column) or 0, expected.of(named) / GIB)
    if gib("compute_mib"):
        yield Compared(row, "compute buffer", gib("compute_mib") or 0, passing * GIB / MIB)
    kv, tokens = gib("kv_gib"), gib("kv_tokens")
    if kv and tokens:
        batch = _int(row["batch"]) or 1
        held = sizes(arch, weights, target, row["engine"], kv_dtype, s).kv_cache(int(tokens) // batch, batch)
        yield Compared(row, "KV tokens per GiB", tokens / kv, tokens / held * GIB)
    total = gib("total_gib") or ((device.usable_gib or 0) if row["device"] else None)
    if row["engine"] == "vllm" and kv is not None and total and row["sequences"]:
        beside = (expected.total - expected.of("KV cache")) / GIB
        yield Compared(row, "total", s.utilization * total - kv, beside)
