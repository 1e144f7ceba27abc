"""Memory by part: as shares of a total, and against what devices have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ... import units
from .svg import CHARACTER, WIDTH, Scale, line, nothing, rect, short, svg, text


@dataclass(frozen=True)
class Part:
    """One segment of a stacked bar: CSS class, name, size in bytes."""

    css: str
    name: str
    nbytes: int


def stacked_bars(bars: Sequence[tuple[str, Sequence[Part]]]) -> Markup:
    """Horizontal bars in proportion to bytes, with their totals and shares."""
    x = Scale(0, max([sum(p.nbytes for p in parts) for _, parts in bars] + [1]), 0, WIDTH)
    out = []
    y = 4.0
    for name, parts in bars:
        total = units.size(sum(p.nbytes for p in parts))
        room = int((WIDTH - CHARACTER * len(total)) / CHARACTER) - 1
        out += [text(0, y + 11, short(name, room), "label"), text(WIDTH, y + 11, total, "value", "end")]
        out += _segments(parts, x, y + 18, 26)
        y += 58
    summary = "; ".join(f"{name}: {_words(parts)}" for name, parts in bars)
    return svg(out, y, "Memory by part. " + summary)


def _segments(parts: Sequence[Part], x: Scale, y: float, height: float, limit: float | None = None) -> list[str]:
    """limit: where a line will cross them, which their sizes keep clear of."""
    total = max(1, sum(p.nbytes for p in parts))
    out, at = [], 0.0
    for part in parts:
        start, end = x(at), x(at + part.nbytes)
        at += part.nbytes
        if end <= start:
            continue
        shown = max(0.5, end - start - 1.5)
        title = f"{part.name}: {units.size(part.nbytes)}, {part.nbytes / total:.1%}"
        out.append(rect(f"fill-{part.css}", start, y, shown, height, title, min(3, height / 4)))
        middle = _middle(start, start + shown, limit)
        if height > 20 and middle is not None:
            out.append(text(middle, y + height / 2 + 4, units.size(part.nbytes), "on-fill", "middle"))
    return out


_LABEL = 62.0  # that a size takes


def _middle(start: float, end: float, limit: float | None) -> float | None:
    """Where a size is written in a segment: in the middle of it, or of the larger part beside the line that crosses it;
    None where there is no room."""
    if limit is not None and start < limit < end and abs(limit - (start + end) / 2) < _LABEL / 2 + 4:
        start, end = (start, limit) if limit - start > end - limit else (limit, end)
    return (start + end) / 2 if end - start > _LABEL else None


def _words(parts: Sequence[Part]) -> str:
    return ", ".join(f"{p.name} {units.size(p.nbytes)}" for p in parts if p.nbytes)


@dataclass(frozen=True)
class Held:
    """What a model takes on a device, against what there is. usable, nominal: bytes; None: not known.

    fits: None where usable is not known"""

    name: str
    parts: tuple[Part, ...]
    usable: int | None
    nominal: int | None
    fits: bool | None

    @property
    def total(self) -> int:
        return sum(p.nbytes for p in self.parts)

    @property
    def words(self) -> str:
        room = "usable memory unknown" if self.usable is None else f"{units.size(self.usable)} usable"
        whole = f" of {units.size(self.nominal)}" if self.nominal else ""
        verdict = {True: "fits", False: "does not fit", None: "unknown"}[self.fits]
        return f"{units.size(self.total)}, {room}{whole}: {verdict}"


def limited_bars(rows: Sequence[Held]) -> Markup:
    """A bar for each device, its usable memory as a line across it, its nominal memory as the frame behind."""
    if not rows:
        return nothing("no device", "Memory by device: none")
    top = max([row.total for row in rows] + [row.usable or 0 for row in rows] + [row.nominal or 0 for row in rows])
    return _roomy(rows, top) if len(rows) <= 6 else _tight(rows, top)


def _roomy(rows: Sequence[Held], top: int) -> Markup:
    x = Scale(0, top, 0, WIDTH - 2)
    out, y = [], 4.0
    for row in rows:
        total = f"{units.size(row.total)}{'' if row.fits is not False else ', does not fit'}"
        room = int((WIDTH - CHARACTER * len(total)) / CHARACTER) - 1
        out += [text(0, y + 11, short(row.name, room), "label"), text(WIDTH, y + 11, total, "value", "end")]
        out += _against(row, x, y + 19, 28)
        if row.usable is not None:
            at, words = x(row.usable), f"usable {units.size(row.usable)}"
            wide = 7.2 * len(words)
            out.append(text(min(WIDTH, max(at, wide)), y + 64, words, "tick", "end"))
        y += 78
    return svg(out, y - 4, "Memory by part on each device. " + "; ".join(_described(row) for row in rows))


def _tight(rows: Sequence[Held], top: int) -> Markup:
    left = min(170.0, 8.2 * max(len(row.name) for row in rows) + 10)
    x = Scale(0, top, left, WIDTH - 62)
    out, y = [], 6.0
    for row in rows:
        out.append(text(0, y + 16, short(row.name, int((left - 8) / 7.4)), "label"))
        out += _against(row, x, y + 5, 14)
        sign = "" if row.fits is not False else "✗ "
        out.append(text(WIDTH, y + 16, sign + units.size(row.total), "value", "end"))
        y += 24
    return svg(out, y + 8, "Memory on each device. " + "; ".join(f"{row.name}: {row.words}" for row in rows))


def _against(row: Held, x: Scale, y: float, height: float) -> list[str]:
    out = []
    if row.nominal:
        out.append(
            rect("room", x(0), y, x(row.nominal) - x(0), height, f"{row.name}: {units.size(row.nominal)} nominal")
        )
    out += _segments(row.parts, x, y + 3, height - 6, None if row.usable is None else x(row.usable))
    if row.usable is not None:
        out.append(
            line("limit", x(row.usable), y - 3, x(row.usable), y + height + 3, f"{units.size(row.usable)} usable")
        )
    return out


def _described(row: Held) -> str:
    return f"{row.name}: {row.words}; {_words(row.parts)}"
