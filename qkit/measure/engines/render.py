"""A sweep as tables of text, and how its figures are defined."""

from __future__ import annotations

from ... import units
from . import bandwidth
from .types import Point, Sweep

Table = tuple[list[str], list[list[str]]]  # header, rows

FORMULAS = {
    "sweep": "each point after a warm-up run of two new tokens; as many of its repeats as its time has room for, one "
    "at least; it is skipped where a smaller point shows that prefill alone would take longer",
    "sweep TTFT": "from the call until every sequence of the batch has its first new token; median over the repeats",
    "sweep TPOT": "time of a step in which every sequence gets one new token: of qkit the bare forward and argmax, of "
    "llama.cpp llama_decode and its greedy sampler, of vLLM a step of its engine, scheduling included",
    "sweep decode tok/s": "batch x steps / sum of their times",
    "sweep generate tok/s": "the engine's own generate: batch x (new tokens - 1) / time after the first new token "
    "(vLLM: mean over the sequences)",
    "sweep peak": "the most that the engine's processes held in RAM during the timed runs, weights and libraries "
    "included (on a GPU: what torch allocated there)",
    **bandwidth.FORMULAS,
}


def table(sweep: Sweep) -> Table:
    """A row for each point that was measured."""
    head = ["batch", "context", "prefill tok/s", "TTFT p50", "TPOT p50", "TPOT p90", "TPOT p99", "decode tok/s"]
    head += ["generate tok/s", "read GB/s", "of ceiling", "peak memory", "runs"]
    return head, [_row(point) for point in sweep.measured]


def _row(point: Point) -> list[str]:
    return [
        str(point.batch),
        f"{point.context:,}",
        _rate(point.prefill_tps),
        _ms(point.ttft_p50),
        _ms(point.tpot_p50),
        _ms(point.tpot_p90),
        _ms(point.tpot_p99),
        _rate(point.decode_tps),
        _rate(point.generate_tps),
        _rate(point.read_gbs),
        "-" if point.read_share is None else f"{point.read_share:.0%}",
        "-" if point.peak_bytes is None else units.size(point.peak_bytes),
        f"{point.repeats} after {point.warmups}",
    ]


def skipped(sweep: Sweep) -> Table | None:
    """What was not measured, and why; None where all was."""
    rows = [[str(p.batch), f"{p.context:,}", p.skipped] for p in sweep.points if p.skipped is not None]
    return (["batch", "context", "not measured"], rows) if rows else None


def title(sweep: Sweep) -> str:
    known = {name: sweep.settings.get(name) for name in ("dtype", "threads")}
    told = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    said = f"{sweep.model} in {sweep.engine_version or sweep.engine}"
    return f"{said} ({told})" if told else said


def sections(sweeps: tuple[Sweep, ...]) -> list[tuple[str, Table]]:
    """Every table with its title, for whichever writer shows them."""
    found = []
    for each in sweeps:
        if each.measured:
            found.append((title(each), table(each)))
        rest = skipped(each)
        if rest:
            found.append((f"{title(each)}: not measured", rest))
    return found


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.2f} ms"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
