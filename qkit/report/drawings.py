"""A measured profile's charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from ..measure.engines.types import Sweep
from ..measure.types import Measured, Memory, Profile
from . import charts, tables
from .wording import headline

_ACTIVE = 0.8  # below this share of its parameters a model is a mixture, whose prompts read more than its steps


def parts(memory: Memory) -> list[charts.Part]:
    """The measured total by part; what was not measured has no bytes here."""
    return [
        charts.Part("packed", "packed linears", memory.packed),
        charts.Part("embeddings", "embedding", memory.embeddings),
        charts.Part("unquantized", "not quantized", memory.unquantized),
        charts.Part("kv", "KV cache", memory.kv_cache or 0),
        charts.Part("activations", "activations", memory.activations or 0),
        charts.Part("process", "the process", memory.process or 0),
    ]


def memory(named: Sequence[tuple[str, Measured]]) -> Markup:
    return charts.stacked_bars([(head, parts(row.memory)) for head, row in named])


def divergence(result: Profile, row: Measured) -> Markup | None:
    scores = headline(result, row)
    compared = scores.against if scores else None
    return charts.log_percentiles(compared.kld_percentiles, compared.kld.value) if compared else None


def frontier(result: Profile) -> Markup | None:
    """Of several models that were compared with one."""
    points = []
    for name, row in zip(tables.heads(result), result.models, strict=False):
        scores = headline(result, row)
        if scores and scores.against:
            kld = scores.against.kld
            points.append(charts.Mark(name, row.stored_bytes, kld.value, kld.error, bool(row.on_frontier)))
    return charts.frontier(points) if len(points) > 1 else None


def latency(named: Sequence[tuple[str, Measured]]) -> Markup | None:
    timed = [("base" if name == "baseline" else "packed", name, row.speed[0].tpot) for name, row in named if row.speed]
    return charts.histogram(timed) if timed else None


def roof(result: Profile) -> Markup | None:
    """Where the first model's runs stand under the bandwidth that was measured here; None where what they read is not
    known. A CPU's peak depends on the type that a kernel multiplies in, so none is drawn."""
    row, device = result.models[0], result.device
    known = device.get("catalogue") or {}
    peak = known.get("fp16_tflops") if device["id"] != "cpu" else None
    spots = list(_spots(row))
    bandwidth = device["read_ceiling_gbs"] * 1e9
    return charts.roofline(bandwidth, peak * 1e12 if peak else None, spots, "measured") if spots else None


def _spots(row: Measured) -> Iterator[charts.Spot]:
    """Two operations for each parameter that a token meets; attention is left out."""
    active = row.active_parameters
    for s in row.speed if active else ():
        if s.read_gbs is None or not active:
            continue
        read = s.read_gbs * 1e9 * s.tpot_p50  # bytes of a step
        yield charts.Spot(f"batch {s.batch}", False, 2 * active * s.batch / read, 2 * active * s.decode_tps)
        if active > _ACTIVE * row.parameters:
            tokens = s.prompt * s.batch
            yield charts.Spot(f"prefill {tokens:,}", True, 2 * active * tokens / read, 2 * active * s.prefill_tps)


def sweeps(found: Sequence[Sweep]) -> list[tuple[str, Markup]]:
    """(title, chart): decode along the context and along the batch, where there are points to join."""
    drawn = []
    measured = [sweep for sweep in found if sweep.measured][:4]
    for along, words in (("context", "tokens of context"), ("batch", "sequences at once")):
        other = "batch" if along == "context" else "context"
        series = []
        for i, sweep in enumerate(measured, 1):
            least = min(getattr(p, other) for p in sweep.measured)
            points = tuple(
                (getattr(p, along), p.decode_tps, None, None)
                for p in sweep.measured
                if getattr(p, other) == least and p.decode_tps
            )
            series.append(charts.Curve(f"series{i}", _name(sweep, other, least), points))
        if any(len(each.points) > 1 for each in series):
            drawn.append((f"Decode over {along}", charts.curves(series, f"Decode over {along}, measured", words)))
    return drawn


def _name(sweep: Sweep, other: str, least: int) -> str:
    return f"{sweep.model} in {sweep.engine}, {other} {least:,}"


def swept(found: Sequence[Sweep]) -> list[tuple[str, str]]:
    """(CSS class, name) of the sweeps that are drawn."""
    measured = [sweep for sweep in found if sweep.measured][:4]
    return [(f"series{i}", f"{sweep.model} in {sweep.engine}") for i, sweep in enumerate(measured, 1)]
