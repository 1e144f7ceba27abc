"""Published tokens per second, read from a table: what was asked of which engine on which device, and what it gave.

Columns: model, params_b, format, bits (of the decoder's linears), engine, gpu, n_gpus, batch ("max": as many as fit),
prompt_len, gen_len_or_ctx, phase, tokens_per_s, source. Lengths may be empty. Columns that a file need not have:
bandwidth_gbs, which was measured and counts for more than the catalogue's, and which a CPU needs that no catalogue
knows ("CPU:<model> 2T"); head_bits, of the output head where it is known.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qkit.errors import QkitError
from qkit.estimate import engines
from qkit.estimate.parts import Part, Weights
from qkit.estimate.rates import Setting
from qkit.estimate.speed import Load
from qkit.estimate.traffic import Traffic, traffic
from qkit.hardware.catalogue import find
from qkit.hardware.device import Device
from qkit.models.architecture import Architecture, architecture

_OVERHEAD = 1.5e9  # bytes a device: context, activations
_LOADED = 0.9  # of the memory that engines take


@dataclass(frozen=True)
class Row:
    """published: the table's own words; room: bytes for caches."""

    published: dict[str, str]
    work: Traffic
    setting: Setting
    load: Load
    room: float
    threads: int | None
    tokens_per_s: float

    @property
    def words(self) -> str:
        p = self.published
        asked = f"batch {p['batch']}, {p['prompt_len'] or '?'} + {p['gen_len_or_ctx'] or '?'} tokens"
        devices = f"{p['n_gpus']} x {p['gpu']}" if p["n_gpus"] != "1" else p["gpu"]
        return f"{p['phase']}: {p['engine']}, {devices}, {p['model']} {p['format']}, {asked}"


def read(path: Path) -> tuple[list[Row], list[str]]:
    """(rows with a figure, what of the others is not understood, in words)."""
    rows, skipped = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for line, published in enumerate(csv.DictReader(file), 2):
            if not published.get("tokens_per_s"):
                continue
            try:
                rows.append(_row(published))
            except (QkitError, KeyError, ValueError) as error:
                skipped.append(f"line {line}: {published.get('model')} on {published.get('gpu')}: {error}")
    return rows, skipped


def _row(p: dict[str, str]) -> Row:
    engine = engines.named(p["engine"])
    bits = float(p["bits"])
    kernel = engines.kernel_named(p["format"], bits)
    device, count = _device(p["gpu"], _number(p.get("bandwidth_gbs"))), int(p["n_gpus"] or 1)
    head = _number(p.get("head_bits")) or _head_bits(bits, engine)
    work = _traffic(p["model"], float(p["params_b"] or 0), bits, head, engine, _cache_bits(p["format"]))
    library = engines.library(engine, kernel, p["engine"], p["format"])
    setting = Setting(engine, p["engine"], kernel, library, device, count, p["phase"], work.experts > 0)
    weights = work.dense_bytes + work.expert_bytes + 2 * work.head_bytes
    room = count * ((device.memory_bytes or 0) * _LOADED - _OVERHEAD) - weights
    threads = re.search(r"(\d+)T\b", p["gpu"])
    return Row(
        p, work, setting, _load(p, engine), max(room, 0.0), int(threads[1]) if threads else None,
        float(p["tokens_per_s"]),
    )  # fmt: skip


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _device(name: str, bandwidth: float | None = None) -> Device:
    try:
        found = find(name)
    except QkitError:
        if name.startswith("CPU:") and bandwidth:
            return _cpu(name, bandwidth)
        if not re.match(r"CPU:(AVX|x86)", name):
            raise
        return find("desktop-ddr5-5600")  # a CPU of which no more is told
    if bandwidth:
        found = replace(found, bandwidth_gbs=bandwidth)
    if name.startswith("CPU:") and found.kind != "cpu":  # the cores of a chip that has a GPU, too
        return replace(found, kind="cpu", fp32_tflops=None, capability="arm" if found.vendor == "Apple" else "x86")
    return found


def _cpu(name: str, bandwidth: float) -> Device:
    """A CPU that no catalogue knows, as `qkit.hardware.detect.local_target` has it."""
    model = re.sub(r"\s*\d+T$", "", name.removeprefix("CPU:")).strip()
    arm = re.search(r"apple|arm|ampere|graviton|neoverse|cortex|snapdragon", model, re.IGNORECASE)
    return Device(
        id="cpu", name=model, vendor="", arch="", kind="cpu", aliases=(),
        memory_gib=None, usable_gib=None, bandwidth_gbs=bandwidth, capability="arm" if arm else "x86",
    )  # fmt: skip


def _load(p: dict[str, str], engine: engines.Engine) -> Load:
    source = p.get("source", "").lower()
    sequences = float(p["batch"]) if re.fullmatch(r"\d+", p["batch"]) else None
    prompt, generated = (int(t) if t.isdigit() else None for t in (p["prompt_len"], p["gen_len_or_ctx"]))
    if "kv cache prealloc" in source:  # a cache of full length is looked at from the first token on
        prompt, generated = generated, 1
    whole = any(words in source for words in ("incl. prefill", "e2e", "generated/total"))
    micro = p["phase"] == "prefill" and (sequences or 1) > 1 and ("micro-batch" in source or engine.manner.chunked)
    if p["phase"] == "prefill":  # the context that is there already, where one is told
        generated = generated if micro and "depth" in source else 0
        prompt = 512 if prompt is None else prompt
    return Load(p["phase"], sequences, prompt, generated, whole, micro)


def _cache_bits(text: str) -> float:
    found = re.search(r"kv\s?(4)\b|(fp8|int8) kv", text, re.IGNORECASE)
    return 16.0 if not found else 4.0 if found[1] else 8.0


def _head_bits(bits: float, engine: engines.Engine) -> float:
    if engine.head == "gguf":  # Q6_K unless the file is one of more bits
        return bits if bits > 8 else max(6.6, bits)
    return bits if engine.head == "weights" else 16.0


def _traffic(
    model: str, params_b: float, bits: float, head_bits: float, engine: engines.Engine, cache_bits: float
) -> Traffic:
    arch, scale = _architecture(model, params_b)
    parts = []
    for m in arch.matrices:
        stored = head_bits if m.role in ("head", "embedding") else bits
        active = 0.0 if m.role == "embedding" and not arch.tied else m.active or float(m is arch.embedding)
        parts.append(Part(m.role, round(m.numel * scale * stored / 8), 0, m.count, active))
    return traffic(arch, Weights.of(parts), cache_bytes=cache_bits / 8, latent=engine.name != "transformers")


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """Of models.json: names, config; made: a shape that only benchmarks have, which stands for no other model."""
    return tuple(json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8")))


@cache
def _models(made: bool = True) -> dict[str, Architecture]:
    wanted = [entry for entry in entries() if made or not entry.get("made")]
    return {_key(name): architecture(entry["config"]) for entry in wanted for name in entry["names"]}


def _key(name: str) -> str:
    words = re.sub(r"instruct|chat|-it\b|base|-hf\b|v0\.\d|meta-|\(.*?\)", "", name.lower().rpartition("/")[2])
    return re.sub(r"[^a-z0-9.]", "", words)


def _architecture(model: str, params_b: float) -> tuple[Architecture, float]:
    """The architecture of a model by name; of one that is not known, the nearest dense one in size, and by how much its
    matrices are larger."""
    known = _models()
    if _key(model) in known:
        return known[_key(model)], 1.0
    if params_b <= 0:
        raise ValueError("neither the model nor its size is known")
    dense = [a for a in _models(made=False).values() if not any(m.role == "expert" for m in a.layers[-1].matrices)]
    nearest = min(dense, key=lambda a: abs(a.parameters / 1e9 / params_b - 1))
    return nearest, params_b * 1e9 / nearest.parameters
