"""A comparison of two profiles in words: a table for the terminal, a summary for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from .. import units
from ..comparison import Change, Comparison, Pair
from .figures import short
from .layout import cell, markdown, plain, thresholds_met


def text(result: Comparison) -> str:
    """The comparison as a table; with --markdown as a summary for a pull request."""
    return _markdown(result) if result.markdown else _plain(result)


Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows
_HEAD = ("", "before", "after", "change", "")


def _lines(pair: Pair) -> list[tuple[str, ...]]:
    return [
        (c.figure, _shown(c.before, c.unit), _shown(c.after, c.unit), _moved(c), c.verdict)
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
    if unit == "tokens":
        return f"{value:,.0f}"
    if unit == "dollars":
        return f"${value:,.2f}"
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _said(result: Comparison) -> list[str]:
    same = [_title(pair) for pair in result.pairs if _unchanged(pair)] if len(result.pairs) > 1 else []
    said = [f"Nothing changed: {_some(same)}"] if same else []
    said += [f"Only in one report: {_some(result.unpaired)}"] if result.unpaired else []
    if result.failures:
        return [*said, *(f"Threshold missed: {failure}" for failure in result.failures)]
    met = thresholds_met(result.thresholds, "--")
    return [*said, met] if met else said


_SHOWN = 4  # names in a list, and pairs that get a table of their own


def _unchanged(pair: Pair) -> bool:
    return all(change.before == change.after and not change.note for change in pair.changes)


def _tables(result: Comparison) -> list[tuple[str, Table]]:
    """A table for each pair; of many pairs one, with what moved. Of several, those that changed."""
    pairs = [pair for pair in result.pairs if len(result.pairs) == 1 or not _unchanged(pair)]
    if len(pairs) <= _SHOWN:
        return [(_title(pair), (_HEAD, _lines(pair))) for pair in pairs]
    moved = [(_title(pair), line) for pair in pairs for line in _lines(pair) if line[1] != line[2]]
    return [("What changed", (("", *_HEAD), [(name, *line) for name, line in moved]))]


def _plain(result: Comparison) -> str:
    out: list[str] = []
    for title, table in _tables(result):
        out += [title, "", *plain(*table), ""]
    return "\n".join([*out, *(f"  {line}" for line in _said(result))]).rstrip()


def _markdown(result: Comparison) -> str:
    met = "✅ no threshold missed" if result.thresholds else "what changed"
    out = [f"### qkit: {'❌ thresholds missed' if result.failures else met}"]
    for line in _said(result):
        out += ["", f"**{cell(line)}**" if line.startswith("Threshold") else cell(line)]
    for title, table in _tables(result):
        out += ["", f"#### {cell(title)}", "", *markdown(*table)]
    return "\n".join(out)
