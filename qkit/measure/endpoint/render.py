"""A load test as text: tables as data, the summary for a terminal, Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ...report import layout
from ...report.layout import cell, plain
from .types import Endpoint, Level, Spread

Table = tuple[list[str], list[list[str]]]  # header, rows


def levels(result: Endpoint) -> Table:
    """A row for each concurrency; every time is of the requests that succeeded."""
    head = ["concurrency", "requests", "failed", "output tok/s", "full load tok/s", "requests/s"]
    head += [f"{what} {p}" for what in ("TTFT", "TPOT") for p in ("p50", "p90", "p99")]
    head += ["latency p50", "latency p99"]
    return head, [_row(level) for level in result.levels]


def _row(level: Level) -> list[str]:
    failed = level.requests - level.succeeded
    return [
        str(level.concurrency),
        str(level.requests),
        str(failed),
        _rate(level.output_tps if level.succeeded else None),
        _rate(level.steady_tps),
        f"{level.requests_per_s:.2f}" if level.succeeded else "-",
        *_ms(level.ttft, "p50", "p90", "p99"),
        *_ms(level.tpot, "p50", "p90", "p99"),
        *_ms(level.latency, "p50", "p99"),
    ]


def failed(result: Endpoint) -> Table | None:
    """What failed, by concurrency and reason; None where nothing did."""
    each = [("warm-up", f) for f in result.warmup_failures]
    each += [(str(level.concurrency), f) for level in result.levels for f in level.failed]
    rows = [[where, f.reason, str(f.count), f.example] for where, f in each]
    return (["concurrency", "reason", "requests", "for instance"], rows) if rows else None


def facts(result: Endpoint) -> Table:
    """What was asked of which server, and how it was counted."""
    first = next((level for level in result.levels if level.succeeded), None)
    prompt = f"{result.context:,} tokens asked for, by {result.prompt_basis}"
    if first and first.prompt_tokens:
        prompt += f"; {first.prompt_tokens / first.succeeded:,.1f} on average, as the server counts"
    early = sum(level.ended_early for level in result.levels)
    output = f"{result.max_tokens} tokens a request" + (f"; {early} requests ended before" if early else "")
    output += "" if result.ignore_eos else "; the server does not take ignore_eos"
    rows = [
        ["endpoint", f"{result.url}{result.route}"],
        ["model", result.model],
        ["prompt", prompt],
        ["output", output],
        ["tokens counted by", result.counted],
        ["warm-up", f"{result.warmups} requests, in no figure"],
    ]
    rows += [[f"concurrency {level.concurrency}", level.problem] for level in result.levels if level.problem]
    if result.problem:
        rows.append(["ended early", result.problem])
    if result.unmeasured:
        rows.append(["not tried", "concurrency " + ", ".join(map(str, result.unmeasured))])
    return ["", ""], rows


def sections(result: Endpoint) -> list[tuple[str, Table]]:
    """Every table with its title, for whichever writer shows them."""
    wrong = failed(result)
    found = [("Load (measured)", levels(result))]
    found += [("Failed requests, which are in no figure", wrong)] if wrong else []
    return [*found, ("Measured on", facts(result))]


def summary(result: Endpoint) -> str:
    """What the command line prints."""
    lines = [result.model, ""]
    wrong = failed(result)
    lines += [*plain(*levels(result)), ""]
    lines += [*plain(*wrong), ""] if wrong else []
    lines += plain(*facts(result))[1:]
    lines += [f"  report: {result.out}"] if result.out else []
    lines += [f"  {failure}" for failure in result.failures]
    return "\n".join(lines)


def markdown(result: Endpoint) -> str:
    out = [f"# {cell(result.model)} at {cell(result.url)}"]
    for title, table in sections(result):
        out += ["", f"## {title}", "", *layout.markdown(*table)]
    out += ["", "## How each figure is defined", ""]
    out += [f"- **{cell(name)}**: {cell(formula)}" for name, formula in result.formulas.items()]
    return "\n".join([*out, ""])


def _ms(spread: Spread | None, *names: str) -> Sequence[str]:
    return ["-" if spread is None else f"{getattr(spread, name) * 1e3:,.1f} ms" for name in names]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
