"""What every chart is made of: text, scales, the frame of an SVG, and labels that keep clear of each other.

The charts are own SVG, not a plotting library's: the few kinds that a report needs are a few hundred lines, where a
library brings megabytes of script into each page, or pictures that follow no theme. As inline SVG they need no script,
take their colours from the page's style sheet (light, dark and print), are sharp at any size, and are text to a reader.

Every text is escaped here; the results are safe to place into HTML as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 440  # of the drawing; near what a column of the page has, so that text keeps its size
CHARACTER, LINE = 8.0, 15.0  # of 13 px text: a character in the widest of the page's fonts, and a line


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` to coordinates from `start` to `end`; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        at, low, high = (self._of(v) for v in (value, self.low, self.high))
        share = (min(max(at, low), high) - low) / (high - low) if high > low else 0.0
        return self.start + (self.end - self.start) * share

    def _of(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(value) if value > 0 else -math.inf

    @property
    def ticks(self) -> list[float]:
        """Round numbers; of a logarithmic scale powers of ten, with 2 and 5 where those are few."""
        if not self.log:
            return ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = [10.0**n for n in range(first, last + 1)]
        steps = powers if last - first > 3 else [p * n for p in powers for n in (1, 2, 5)]
        return [t for t in steps if self.low * 0.999 <= t <= self.high * 1.001]


def ticks(start: float, end: float) -> list[float]:
    """Three to six round numbers between the two."""
    raw = (end - start) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= raw)
    return [n * step for n in range(math.ceil(start / step), math.floor(end / step) + 1)]


def text(x: float, y: float, content: str, css: str, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(css: str, x1: float, y1: float, x2: float, y2: float, title: str = "") -> str:
    return _element("line", f'class="{css}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"', title)


def dot(css: str, x: float, y: float, title: str = "", radius: float = 5) -> str:
    return _element("circle", f'class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"', title)


def rect(css: str, x: float, y: float, width: float, height: float, title: str = "", radius: float = 3) -> str:
    box = f'class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"'
    return _element("rect", box, title)


def path(css: str, points: Sequence[tuple[float, float]], closed: bool = False) -> str:
    drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
    return f'<path class="{css}" d="{drawn}"/>'


def _element(name: str, attributes: str, title: str) -> str:
    return f"<{name} {attributes}><title>{escape(title)}</title></{name}>" if title else f"<{name} {attributes}/>"


def svg(parts: Sequence[str], height: float, description: str) -> Markup:
    """The drawing; description is what a screen reader says in its place: it has the numbers."""
    label, body = escape(description), "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" class="chart">{body}</svg>')


def nothing(words: str, description: str) -> Markup:
    """In place of a chart that has nothing to draw."""
    return svg([text(0, 16, words, "label")], 24, description)


def frame(x: Scale, y: Scale, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]]) -> list[str]:
    """Grid lines and tick labels of a plot; xs, ys: values with what is written at them."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    out = []
    for value, name in ys:
        out.append(line("grid", left, y(value), right, y(value)))
        out.append(text(left - 6, y(value) + 4, name, "tick", "end"))
    shown = -math.inf  # where the last label ends
    for value, name in xs:
        at, half = x(value), CHARACTER * 0.92 * len(name) / 2
        middle = min(at, WIDTH - half)
        if middle - half < shown + 5:
            continue
        shown = middle + half
        out.append(line("grid", at, bottom, at, bottom + 4))
        out.append(text(middle, bottom + 18, name, "tick", "middle"))
    return [*out, line("axis", left, bottom, right, bottom), line("axis", left, bottom, left, top)]


def short(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


Box = tuple[float, float, float, float]  # left, top, right, bottom


def beside(
    points: Sequence[tuple[str, float, float]], top: float, bottom: float, avoid: Sequence[Box] = (), longest: int = 28
) -> list[str]:
    """Names beside their points, each moved up or down to where it covers neither a point nor another name, nor what is
    to be avoided where that can be helped."""
    taken = [(px - 6, py - 6, px + 6, py + 6) for _, px, py in points]
    out = []
    for name, px, py in sorted(points, key=lambda p: p[2]):
        shown = short(name, longest)
        width = CHARACTER * len(shown)
        right = px + 10 + width <= WIDTH
        at = px + 10 if right else max(0.0, px - 10 - width)
        steps = sorted((sign * n * LINE / 3 for n in range(3 * len(points) + 9) for sign in (1, -1)), key=abs)
        inside = [py + step for step in steps if top + 6 <= py + step <= bottom - 2] or [py]
        boxes = [(at, middle - 9, at + width, middle + 6) for middle in inside]
        free = [b for b in boxes if not any(_meet(b, other) for other in taken)] or boxes[:1]
        box = next((b for b in free if not any(_meet(b, other) for other in avoid)), free[0])
        taken.append(box)
        if abs(box[1] + 9 - py) > LINE / 2:
            edge = at - 2 if right else at + width + 2
            out.append(line("leader", px, py, edge, box[1] + 8))
        out.append(text(at if right else at + width, box[1] + 13, shown, "label", "start" if right else "end"))
    return out


def along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Boxes that cover a line, for `beside` to avoid it."""
    count = max(1, int(max(abs(end[0] - start[0]), abs(end[1] - start[1])) / 6))
    spots = [tuple(a + (b - a) * i / count for a, b in zip(start, end, strict=True)) for i in range(count + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in spots]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def figure(value: float) -> str:
    """A number with three or four significant digits, never as 1e-05 above a thousandth."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


def power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if exponent >= -3 else f"1e{exponent}"
