"""The report's charts as inline SVG. Colours are CSS classes, so that the page's light and dark themes apply.

Every text is escaped here; the results are safe to place into HTML as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .. import units

WIDTH = 440  # of the drawing; near what a column of the page has, so that text keeps its size


@dataclass(frozen=True)
class Part:
    """One segment of a stacked bar: CSS class, name, size in bytes."""

    css: str
    name: str
    nbytes: int


def stacked_bars(bars: Sequence[tuple[str, Sequence[Part]]]) -> Markup:
    """Horizontal bars in proportion to bytes, with their totals and shares."""
    top = max([sum(p.nbytes for p in parts) for _, parts in bars] + [1])
    out = []
    y = 4.0
    for name, parts in bars:
        total = sum(p.nbytes for p in parts)
        out.append(_text(0, y + 11, name, "label"))
        out.append(_text(WIDTH, y + 11, units.size(total), "value", "end"))
        x = 0.0
        for part in parts:
            width = WIDTH * part.nbytes / top
            if width <= 0:
                continue
            title = escape(f"{part.name}: {units.size(part.nbytes)}, {part.nbytes / max(1, total):.1%}")
            shown = max(0.5, width - 1.5)
            out.append(
                f'<rect class="fill-{part.css}" x="{x:.1f}" y="{y + 18:.1f}" width="{shown:.1f}" height="26" rx="3">'
                f"<title>{title}</title></rect>"
            )
            if width > 58:
                out.append(_text(x + shown / 2, y + 35, units.size(part.nbytes), "on-fill", "middle"))
            x += width
        y += 58
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{p.name} {units.size(p.nbytes)}" for p in parts) for name, parts in bars
    )
    return _svg(out, y, "Memory by part. " + summary)


def log_percentiles(values: dict[str, float], mean: float) -> Markup:
    """One row a percentile on a logarithmic axis: a line from the left edge to a dot, and the value."""
    positive = [v for v in values.values() if v > 0]
    if not positive:
        return _svg([_text(0, 16, "every value is zero: the models agree exactly", "label")], 24, "All values are zero")
    low = max(math.floor(math.log10(min(positive))), math.floor(math.log10(max(positive))) - 7)
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    left, right = 62.0, WIDTH - 66.0
    bottom = 8 + 22 * len(values)

    def x(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return left + (right - left) * (min(max(exponent, low), high) - low) / (high - low)

    out = []
    step = max(1, math.ceil((high - low) / 5))
    for exponent in range(low, high + 1, step):
        at = x(10.0**exponent)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom}"/>')
        tick = f"{10.0**exponent:g}" if exponent >= -3 else f"1e{exponent}"
        out.append(_text(at, bottom + 16, tick, "tick", "middle"))
    for row, (name, value) in enumerate(values.items()):
        y = 16 + 22 * row
        out.append(_text(left - 10, y + 4, name if name in ("max", "median", "min") else f"{name}%", "label", "end"))
        out.append(f'<line class="stem" x1="{left:.1f}" x2="{x(value):.1f}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="fill-packed" cx="{x(value):.1f}" cy="{y}" r="5"/>')
        out.append(_text(WIDTH, y + 4, figure(value), "value", "end"))
    if mean > 0:
        at = x(mean)
        out.append(f'<line class="marker" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom}"/>')
        right_half = at > (left + right) / 2  # keep clear of the values at the right edge
        offset, anchor = (-5, "end") if right_half else (5, "start")
        out.append(_text(at + offset, bottom - 3, f"mean {figure(mean)}", "tick", anchor))
    summary = ", ".join(f"{name} {figure(value)}" for name, value in values.items())
    return _svg(out, bottom + 24, f"KL divergence percentiles, logarithmic axis. Mean {figure(mean)}; {summary}")


def histogram(series: Sequence[tuple[str, str, Sequence[float]]], bins: int = 36) -> Markup:
    """Distributions of seconds on one axis in ms, one below the other: (CSS class, name, values).

    The axis ends at the largest p99 and a little more; the tail beyond it is counted in the last bin.
    """
    import numpy as np

    arrays = [np.asarray(values) * 1e3 for _, _, values in series]
    start = 0.0 if len(arrays) > 1 else max(0.0, min(float(a.min()) for a in arrays) * 0.9)
    end = max(float(np.percentile(a, 99)) for a in arrays) * 1.08
    end = end if end > start else start + 1.0
    height, y, out = 64, 0.0, []

    def x(value: float) -> float:
        return WIDTH * (min(value, end) - start) / (end - start)

    notes = []
    for (css, name, _), array in zip(series, arrays, strict=True):
        counts, _ = np.histogram(np.clip(array, start, end), bins=bins, range=(start, end))
        p50, p99 = float(np.percentile(array, 50)), float(np.percentile(array, 99))
        note = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        notes.append(f"{name}: {note}")
        out.append(_text(0, y + 14, name, "label"))
        out.append(_text(WIDTH, y + 14, note, "value", "end"))
        base = y + 24 + height
        for i, count in enumerate(counts):
            if count:
                tall = max(2.0, height * count / counts.max())
                width = WIDTH / bins
                out.append(
                    f'<rect class="fill-{css}" x="{i * width + 0.5:.1f}" y="{base - tall:.1f}" '
                    f'width="{width - 1:.1f}" height="{tall:.1f}" rx="1.5"/>'
                )
        for value in (p50, p99):
            out.append(
                f'<line class="marker" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y + 22:.1f}" y2="{base:.1f}"/>'
            )
        out.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{base:.1f}" y2="{base:.1f}"/>')
        y = base + 12
    for i in range(5):
        value = start + (end - start) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        shown = f"{value:.0f}" if end - start >= 20 else f"{value:.1f}"
        out.append(_text(x(value), y + 4, f"{shown} ms", "tick", anchor))
    return _svg(out, y + 12, "Time per output token. " + "; ".join(notes))


@dataclass(frozen=True)
class Mark:
    """One model of a frontier: bytes on disk, its KL divergence with the standard error, whether it is worth having."""

    name: str
    nbytes: int
    kld: float
    error: float
    best: bool


def frontier(marks: Sequence[Mark]) -> Markup:
    """KL divergence, on a logarithmic axis, against size; filled are those worth having."""
    positive = [m.kld for m in marks if m.kld > 0]
    if not positive:
        return _svg([_text(0, 16, "every model agrees with the baseline exactly", "label")], 24, "All values are zero")
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    least, most = min(m.nbytes for m in marks), max(m.nbytes for m in marks)
    pad = 0.12 * (most - least) or 0.12 * most or 1.0
    start, end = max(0.0, least - pad), most + pad
    left, right, top, bottom = 44.0, WIDTH - 8.0, 12.0, max(210.0, 34.0 * len(marks))

    def x(nbytes: float) -> float:
        return left + (right - left) * (nbytes - start) / (end - start)

    def y(value: float) -> float:
        exponent = min(max(math.log10(value) if value > 0 else low, low), high)
        return bottom - (bottom - top) * (exponent - low) / (high - low)

    out = []
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(_text(left - 6, at + 4, f"{10.0**exponent:g}" if exponent >= -3 else f"1e{exponent}", "tick", "end"))
    for tick in _ticks(start, end):
        out.append(_text(x(tick), bottom + 18, units.size(tick), "tick", "middle"))
    out.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    ordered = sorted(marks, key=lambda m: (m.nbytes, m.kld))
    for m in marks:
        cx, cy = x(m.nbytes), y(m.kld)
        upper, lower = y(m.kld + 2 * m.error), y(m.kld - 2 * m.error)
        out.append(f'<line class="stem" x1="{cx:.1f}" x2="{cx:.1f}" y1="{upper:.1f}" y2="{lower:.1f}"/>')
        title = escape(f"{m.name}: {units.size(m.nbytes)}, KL divergence {figure(m.kld)} ± {figure(m.error)}")
        css = "fill-packed" if m.best else "hollow"
        out.append(f'<circle class="{css}" cx="{cx:.1f}" cy="{cy:.1f}" r="5"><title>{title}</title></circle>')
    out += _labels([(m.name, x(m.nbytes), y(m.kld)) for m in marks], top, bottom)
    summary = "; ".join(
        f"{m.name}: {units.size(m.nbytes)}, {figure(m.kld)}{', on the frontier' if m.best else ''}" for m in ordered
    )
    return _svg(out, bottom + 26, f"KL divergence, logarithmic, against size on disk. {summary}")


def _ticks(start: float, end: float) -> list[float]:
    """Three to six round numbers between the two."""
    raw = (end - start) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= raw)
    return [n * step for n in range(math.ceil(start / step), math.floor(end / step) + 1)]


_CHARACTER, _LINE = (
    8.0,
    15.0,
)  # of 13 px text: a character in the widest of the page's fonts, and a line
_LONGEST = 28


def _labels(points: Sequence[tuple[str, float, float]], top: float, bottom: float) -> list[str]:
    """Names beside their points, each moved up or down to where it covers neither a point nor another name."""
    taken = [(px - 6, py - 6, px + 6, py + 6) for _, px, py in points]
    out = []
    for name, px, py in sorted(points, key=lambda p: p[2]):
        shown = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        width = _CHARACTER * len(shown)
        right = px + 10 + width <= WIDTH
        at = px + 10 if right else max(0.0, px - 10 - width)
        steps = sorted((sign * n * _LINE / 3 for n in range(3 * len(points) + 9) for sign in (1, -1)), key=abs)
        inside = [py + step for step in steps if top + 6 <= py + step <= bottom - 2] or [py]
        boxes = [(at, middle - 9, at + width, middle + 6) for middle in inside]
        box = next((b for b in boxes if not any(_meet(b, other) for other in taken)), boxes[0])
        taken.append(box)
        if abs(box[1] + 9 - py) > _LINE / 2:
            edge = at - 2 if right else at + width + 2
            out.append(f'<line class="leader" x1="{px:.1f}" x2="{edge:.1f}" y1="{py:.1f}" y2="{box[1] + 8:.1f}"/>')
        out.append(_text(at if right else at + width, box[1] + 13, shown, "label", "start" if right else "end"))
    return out


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def figure(value: float) -> str:
    """A number with three or four significant digits, never as 1e-05 above a thousandth."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


def _text(x: float, y: float, content: str, css: str, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _svg(parts: Sequence[str], height: float, description: str) -> Markup:
    label = escape(description)
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" class="chart">{body}</svg>')
