"""Speed along batch and context, with the interval as a band, and what so many tokens a month cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from .svg import WIDTH, Box, Scale, along, beside, dot, frame, line, nothing, path, svg, text, ticks
from .times import amount

TOP, BOTTOM, LEFT, RIGHT = 28.0, 228.0, 52.0, WIDTH - 10.0


@dataclass(frozen=True)
class Curve:
    """(x, value, low, high) points of one device; css: "1" to "4"; low and high None where they were measured."""

    css: str
    name: str
    points: tuple[tuple[int, float, float | None, float | None], ...]


def curves(series: Sequence[Curve], what: str, along: str, unit: str = "tokens/s") -> Markup:
    """Tokens a second (or what `unit` says), from zero up, against batch or context, on a logarithmic axis."""
    series = [each for each in series if each.points]
    if not series:
        return nothing("nothing is known", f"{what}: nothing is known")
    xs = sorted({p[0] for each in series for p in each.points})
    high = max(p[3] or p[1] for each in series for p in each.points)
    low_x, high_x = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] / 2, xs[0] * 2)
    x = Scale(low_x, high_x, LEFT + 12, RIGHT - 6, log=True)
    y = Scale(0, high * 1.04, BOTTOM, TOP)
    edges = Scale(low_x, high_x, LEFT, RIGHT)
    out = frame(edges, y, [], [(t, amount(t) if t else "0") for t in ticks(y.low, y.high)])
    out += frame(x, y, [(n, _count(n)) for n in xs], [])[:-2]
    for each in series:
        if len(each.points) > 1 and all(p[2] is not None and p[3] is not None for p in each.points):
            upper = [(x(p[0]), y(p[3] or 0)) for p in each.points]
            lower = [(x(p[0]), y(p[2] or 0)) for p in reversed(each.points)]
            out.append(path(f"band-{each.css}", [*upper, *lower], closed=True))
    for each in series:
        if len(each.points) > 1:
            out.append(path(f"curve-{each.css}", [(x(p[0]), y(p[1])) for p in each.points]))
        for n, value, least, most in each.points:
            known = "" if least is None or most is None else f", nine in ten {amount(least)} to {amount(most)}"
            if len(each.points) == 1 and least is not None and most is not None:
                out.append(line(f"curve-{each.css}", x(n), y(least), x(n), y(most)))
            title = f"{each.name}, {along} {n:,}: {amount(value)} {unit}{known}"
            out.append(dot(f"fill-{each.css}", x(n), y(value), title, 4))
    out += [text((LEFT + RIGHT) / 2, BOTTOM + 36, along, "tick", "middle"), text(0, 12, unit, "tick")]
    return svg(out, BOTTOM + 42, f"{what}. " + "; ".join(_spoken(each, along, unit) for each in series))


def _spoken(each: Curve, along: str, unit: str) -> str:
    def one(p: tuple[int, float, float | None, float | None]) -> str:
        band = "" if p[2] is None or p[3] is None else f" ({amount(p[2])} to {amount(p[3])})"
        return f"{p[0]:,}: {amount(p[1])}{band}"

    return f"{each.name}, {unit} by {along}: " + ", ".join(map(one, each.points))


def _count(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"


@dataclass(frozen=True)
class Bill:
    """A device that is rented: dollars a month for each, millions of tokens a month that it gives, and the volumes at
    which it beats the hosted price first and for good (None: never)."""

    css: str
    name: str
    monthly: float
    capacity: float
    first: float | None
    always: float | None


_STAIRS = 60


def bills(rented: Sequence[Bill], hosted: float | None) -> Markup:
    """Dollars a month against millions of tokens a month: whole devices as stairs, the hosted price as a line."""
    if not rented:
        return nothing("no price is known", "Cost: no price is known")
    paying = [each.first for each in rented if each.first is not None]
    most = max(2.2 * min(each.capacity for each in rented), *(1.3 * volume for volume in paying), 0.0)
    top = max([_bill(each, most) for each in rented] + [hosted * most if hosted else 0.0])
    top = min(top, 4 * max(hosted * most, max(each.monthly for each in rented))) if hosted else top
    x, y = Scale(0, most, LEFT + 8, RIGHT), Scale(0, top * 1.05, BOTTOM, TOP)
    out = frame(
        x,
        y,
        [(t, f"{t:,.0f}" if most >= 10 else f"{t:g}") for t in ticks(0, most)],
        [(t, money(t)) for t in ticks(0, y.high)],
    )
    names: list[tuple[str, float, float]] = []
    avoid: list[Box] = []
    for each in rented:
        stairs = [(x(a), y(b)) for a, b in _stairs(each, most, y.high)]
        avoid += [box for a, b in pairwise(stairs) for box in along(a, b)]
        out.append(path(f"curve-{each.css}", stairs))
        if each.first is not None:
            title = f"{each.name} pays from {each.first:,.0f} million tokens a month, {money(each.monthly)}"
            out.append(dot(f"fill-{each.css}", x(each.first), y(each.monthly), title, 5.5))
            names.append((f"pays from {each.first:,.0f} M", x(each.first), y(each.monthly)))
    if hosted:
        ends = min(most, y.high / hosted)
        out.append(line("hosted", x(0), y(0), x(ends), y(hosted * ends), f"hosted: {money(hosted)} a million tokens"))
        avoid += along((x(0), y(0)), (x(ends), y(hosted * ends)))
    out += beside([each for i, each in enumerate(names) if each not in names[:i]], TOP, BOTTOM, avoid)
    middle = (x.start + x.end) / 2
    out += [text(middle, BOTTOM + 36, "million tokens a month", "tick", "middle"), text(0, 12, "a month", "tick")]
    words = [_said(each) for each in rented]
    words += [f"hosted: {money(hosted)} a million tokens"] if hosted else ["no hosted price is known"]
    return svg(out, BOTTOM + 42, "Dollars a month against tokens a month. " + "; ".join(words))


def _said(each: Bill) -> str:
    pays = "never cheaper than hosted" if each.first is None else f"cheaper than hosted from {each.first:,.0f} million"
    return f"{each.name}: {money(each.monthly)} for up to {each.capacity:,.0f} million tokens, {pays}"


def _bill(each: Bill, millions: float) -> float:
    return each.monthly * max(1, math.ceil(millions / each.capacity - 1e-9))


def _stairs(each: Bill, most: float, top: float) -> list[tuple[float, float]]:
    """Corners up to `most`; where there are too many to be seen, the line through their edges."""
    steps = math.ceil(most / each.capacity)
    if steps > _STAIRS:
        ends = min(most, top / each.monthly * each.capacity)
        return [(0.0, each.monthly), (ends, max(each.monthly, each.monthly * ends / each.capacity))]
    points = []
    for n in range(steps):
        if each.monthly * (n + 1) > top:
            break
        points += [
            (n * each.capacity, each.monthly * (n + 1)),
            (min(most, (n + 1) * each.capacity), each.monthly * (n + 1)),
        ]
    return points or [(0.0, min(top, each.monthly)), (most, min(top, each.monthly))]


def money(value: float) -> str:
    """Dollars, with cents below a hundred, with k above ten thousand."""
    if value >= 10_000:
        return f"${value / 1000:,.0f}k" if value < 1e6 else f"${value / 1e6:,.1f}M"
    return f"${value:,.0f}" if value >= 100 or value == int(value) else f"${value:.2f}"
