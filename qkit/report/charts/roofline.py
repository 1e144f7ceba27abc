"""A roofline: operations a second against operations for each byte that is read, under a device's two ceilings.

Williams et al., "Roofline: an insightful visual performance model" (2009)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from .svg import CHARACTER, WIDTH, Box, Scale, along, beside, dot, frame, line, nothing, path, power, svg, text

TOP, BOTTOM = 28.0, 250.0


@dataclass(frozen=True)
class Spot:
    """One load. name: beside it; x: operations a byte; y: operations/s, with its interval where it is predicted."""

    name: str
    prefill: bool
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def roofline(bandwidth: float, peak: float | None, spots: Sequence[Spot], how: str) -> Markup:
    """bandwidth: bytes/s; peak: operations/s, None where it is not known. how: "predicted" or "measured"."""
    if not spots:
        return nothing("nothing is known", "Roofline: nothing is known")
    ridge = peak / bandwidth if peak else None
    widest = max([s.x for s in spots] + ([ridge * 4] if ridge else []))
    least = min(s.x for s in spots)
    x_low, x_high = _decades(least / 1.5, widest * 1.2)
    lowest = min([s.low or s.y for s in spots] + [bandwidth * x_low])
    highest = max([s.high or s.y for s in spots] + [1.3 * peak if peak else 10 * bandwidth * least])
    y_low, y_high = _decades(lowest / 1.2, highest)
    x = Scale(x_low, x_high, 56.0, WIDTH - 8.0, log=True)
    y = Scale(y_low, y_high, BOTTOM, TOP, log=True)
    out = frame(x, y, [(t, _plain(t)) for t in _powers(x)], [(t, _rate(t)) for t in _powers(y)])
    start = max(x_low, y_low / bandwidth)
    turn = min(x_high, ridge) if ridge else min(x_high, y_high / bandwidth)
    edge = [(x(start), y(bandwidth * start)), (x(turn), y(bandwidth * turn))]
    edge += [(x(x_high), y(peak))] if peak else []
    out.append(path("roof", edge))
    avoid = [box for a, b in pairwise(edge) for box in along(a, b)]
    middle = math.sqrt(start * turn)
    out.append(_caption(f"{bandwidth / 1e9:,.0f} GB/s", x(middle) - 8, y(bandwidth * middle) - 6, avoid))
    if peak:
        # In the corner that the roof cuts off, where no point is; where that has no room, above the roof's end.
        words = f"{_rate(peak)}op/s at most"
        inside = x(turn) - 6 - CHARACTER * len(words) > x.start
        out.append(_caption(words, *((x(turn) - 6, y(peak) + 4) if inside else (x.end, y(peak) - 7)), avoid))
    for s in spots:
        if s.low is not None and s.high is not None:
            ends = (x(s.x), y(s.low)), (x(s.x), y(s.high))
            out.append(line("stem", *ends[0], *ends[1]))
            avoid += along(*ends)
    for s in spots:
        out.append(dot("fill-kv" if s.prefill else "fill-packed", x(s.x), y(s.y), _words(s, bandwidth, peak), 4.5))
    out += beside([(s.name, x(s.x), y(s.y)) for s in spots], TOP, BOTTOM, avoid)
    out.append(text(0, 12, "op/s", "tick"))
    out.append(text((x.start + x.end) / 2, BOTTOM + 36, "operations a byte", "tick", "middle"))
    ceiling = f"{_rate(peak)}op/s" if peak else "unknown"
    summary = "; ".join(_words(s, bandwidth, peak) for s in spots)
    return svg(out, BOTTOM + 42, f"Roofline, {how}: ceilings {bandwidth / 1e9:,.0f} GB/s and {ceiling}. {summary}")


def _caption(words: str, x: float, y: float, avoid: list[Box]) -> str:
    """Text that ends at (x, y), and is avoided from now on."""
    avoid.append((x - CHARACTER * len(words), y - 11, x, y + 3))
    return text(x, y, words, "tick", "end")


def reached(x: float, y: float, bandwidth: float, peak: float | None) -> float:
    """The share of the roof above a point that it reaches."""
    return y / min(bandwidth * x, peak or math.inf)


def _words(s: Spot, bandwidth: float, peak: float | None) -> str:
    band = f" ({_rate(s.low)} to {_rate(s.high)})" if s.low is not None and s.high is not None else ""
    phase = "prefill" if s.prefill else "decode"
    share = reached(s.x, s.y, bandwidth, peak)
    name = s.name if s.name.startswith(phase) else f"{phase} {s.name}"
    return f"{name}: {_plain(s.x)} operations a byte, {_rate(s.y)}op/s{band}, {share:.0%} of the roof"


def _decades(low: float, high: float) -> tuple[float, float]:
    return 10.0 ** math.floor(math.log10(low) + 1e-9), 10.0 ** math.ceil(math.log10(high) - 1e-9)


def _powers(scale: Scale) -> list[float]:
    first, last = round(math.log10(scale.low)), round(math.log10(scale.high))
    return [10.0**n for n in range(first, last + 1)]


def _plain(value: float) -> str:
    if value >= 10 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.2g}" if value >= 1e-3 else power(round(math.log10(value)))


def _rate(value: float | None) -> str:
    """Operations a second with a prefix: "47 G"."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value is not None and value >= limit * 0.999:
            shown = value / limit
            return f"{shown:,.0f} {prefix}" if shown >= 10 or shown == round(shown) else f"{shown:.1f} {prefix}"
    return f"{value or 0:,.0f} "
