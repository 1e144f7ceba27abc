"""A comparison of two profiles in words: a table for the terminal, a summary for a pull request."""

from __future__ import annotations

from .. import units
from ..comparison import Change, Comparison, Pair, short
from .text import cell, markdown_table, plain_table


def text(result: Comparison) -> str:
    """The comparison as a table; with --markdown as a summary for a pull request."""
    return _markdown(result) if result.markdown else _plain(result)


_HEAD = ["", "before", "after", "change", ""]


def _lines(pair: Pair) -> list[list[str]]:
    return [
        [c.figure, _shown(c.before, c.unit), _shown(c.after, c.unit), _moved(c), c.verdict]
        for c in pair.changes
        if c.before is not None or c.after is not None
    ]


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return units.size(value)
    if unit == "seconds":
        return f"{value * 1e3:,.1f} ms"
    if unit == "share":
        return f"{value:.2%}"
    if unit == "tokens/s":
        return f"{value:,.1f} tok/s"
    return f"{value:.4g}"


def _moved(change: Change) -> str:
    difference, relative = change.difference, change.relative
    if difference is None:
        return "-"
    if change.unit == "share":
        return f"{100 * difference:+.2f} points"
    error = f" ± {change.error:.2g}" if change.error else ""
    if change.error is not None:
        return f"{difference:+.3g}{error}"
    return "-" if relative is None else f"{relative:+.1%}"


def _title(pair: Pair) -> str:
    names = short(pair.before), short(pair.after)
    return names[0] if names[0] == names[1] else " → ".join(names)


def _said(result: Comparison) -> list[str]:
    said = [f"only in one report: {name}" for name in result.unpaired]
    if result.failures:
        return [*said, *(f"Threshold missed: {failure}" for failure in result.failures)]
    met = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in result.thresholds.items())
    return [*said, *([f"Thresholds met: {met}"] if met else [])]


def _plain(result: Comparison) -> str:
    out: list[str] = []
    for pair in result.pairs:
        out += [_title(pair), "", *plain_table(_HEAD, _lines(pair)), ""]
    return "\n".join([*out, *(f"  {line}" for line in _said(result))]).rstrip()


def _markdown(result: Comparison) -> str:
    met = "✅ no threshold missed" if result.thresholds else "what changed"
    out = [f"### qkit: {'❌ thresholds missed' if result.failures else met}"]
    for line in _said(result):
        out += ["", f"**{cell(line)}**"]
    for pair in result.pairs:
        out += ["", f"#### {cell(_title(pair))}", "", *markdown_table(_HEAD, _lines(pair))]
    return "\n".join(out)
