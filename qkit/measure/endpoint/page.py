"""A load test as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from ...report import charts, page
from ...report.layout import thresholds_met
from . import render
from .types import Endpoint, Level

Legend = list[tuple[str, str]]
Figure = Callable[[Level], float | None]


def html(result: Endpoint) -> str:
    """Inline style and charts, no script, nothing fetched."""
    return page.render(
        "endpoint.html.jinja",
        title=f"{result.model} at {result.url}",
        verdict=verdict(result),
        status=_status(result),
        passed=result.passed,
        cards=cards(result),
        charts=_charts(result),
        sections=render.sections(result),
        formulas=result.formulas,
        command=result.provenance.get("command", ""),
        version=result.provenance["qkit"],
        date=result.provenance["date"],
    )


def verdict(result: Endpoint) -> str:
    """What the load found, in a sentence."""
    most = _most(result)
    if most is None:
        return "No request succeeded."
    users = f"{most.concurrency} at a time" if most.concurrency > 1 else "one at a time"
    said = f"It gives at most {most.output_tps:,.1f} tokens a second, with {users}"
    if most.ttft and most.tpot:
        said += (
            f": then half of the requests have their first token within {most.ttft.p50 * 1e3:,.0f} ms and another "
            f"every {most.tpot.p50 * 1e3:,.1f} ms"
        )
    return said + "."


def cards(result: Endpoint) -> list[dict[str, str]]:
    """The four figures on top."""
    most, least = _most(result), next((level for level in result.levels if level.succeeded), None)
    sent = sum(level.requests for level in result.levels)
    failed = sent - sum(level.succeeded for level in result.levels)
    alone = f"p50 at concurrency {least.concurrency}" if least else "not measured"
    return [
        {
            "title": "Most output",
            "value": "-" if most is None else f"{most.output_tps:,.1f} tok/s",
            "note": "not measured" if most is None else f"at concurrency {most.concurrency}",
        },
        {
            "title": "Time to first token",
            "value": "-" if least is None or least.ttft is None else f"{least.ttft.p50 * 1e3:,.1f} ms",
            "note": alone,
        },
        {
            "title": "Time per output token",
            "value": "-" if least is None or least.tpot is None else f"{least.tpot.p50 * 1e3:,.1f} ms",
            "note": alone,
        },
        {"title": "Failed", "value": f"{failed:,}", "note": f"of {sent:,} requests; in no other figure"},
    ]


def _status(result: Endpoint) -> str:
    return "; ".join(result.failures) or thresholds_met(result.thresholds)


def _most(result: Endpoint) -> Level | None:
    return max((level for level in result.levels if level.succeeded), key=lambda level: level.output_tps, default=None)


def _charts(result: Endpoint) -> list[tuple[str, str, Markup, Legend]]:
    """(title, note, drawing, legend)."""
    asked = f"prompts of about {result.context:,} tokens, {result.max_tokens:,} new ones"
    output: list[tuple[str, Figure]] = [
        ("whole level", lambda level: level.output_tps if level.succeeded else None),
        ("while all were under way", lambda level: level.steady_tps),
    ]
    first = [(p, _milliseconds("ttft", p)) for p in ("p50", "p99")]
    each = [(p, _milliseconds("tpot", p)) for p in ("p50", "p99")]
    return [
        *_chart(
            result, "Output over concurrency", f"Output tokens a second of all requests; {asked}.", output, "tokens/s"
        ),
        *_chart(result, "Time to first token", "The wait in the server's queue included.", first, "ms"),
        *_chart(result, "Time per output token", "Of a request, after its first token.", each, "ms"),
    ]


def _milliseconds(name: str, p: str) -> Figure:
    def of(level: Level) -> float | None:
        spread = getattr(level, name)
        return None if spread is None else getattr(spread, p) * 1e3

    return of


def _chart(
    result: Endpoint, name: str, note: str, figures: Sequence[tuple[str, Figure]], unit: str
) -> list[tuple[str, str, Markup, Legend]]:
    series = []
    for i, (words, figure) in enumerate(figures, 1):
        known = {level.concurrency: figure(level) for level in result.levels}
        points = tuple((n, value, None, None) for n, value in sorted(known.items()) if value is not None)
        if points:
            series.append(charts.Curve(f"series{i}", words, points))
    if not series:
        return []
    drawn = charts.curves(series, f"{name}, measured", "requests at a time", unit)
    return [(name, note, drawn, [(each.css, each.name) for each in series])]
