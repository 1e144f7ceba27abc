"""How far a model is from its baseline: percentiles of the divergence, and divergence against size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ... import units
from .svg import WIDTH, Scale, beside, dot, figure, line, nothing, power, svg, text, ticks


def log_percentiles(values: dict[str, float], mean: float) -> Markup:
    """One row a percentile on a logarithmic axis: a line from the left edge to a dot, and the value."""
    positive = [v for v in values.values() if v > 0]
    if not positive:
        return nothing("every value is zero: the models agree exactly", "All values are zero")
    low = max(math.floor(math.log10(min(positive))), math.floor(math.log10(max(positive))) - 7)
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    x = Scale(10.0**low, 10.0**high, 62.0, WIDTH - 66.0, log=True)
    bottom = 8 + 22 * len(values)
    out = []
    for exponent in range(low, high + 1, max(1, math.ceil((high - low) / 5))):
        at = x(10.0**exponent)
        out += [line("grid", at, 4, at, bottom), text(at, bottom + 16, power(exponent), "tick", "middle")]
    for row, (name, value) in enumerate(values.items()):
        y = 16 + 22 * row
        shown = name if name in ("max", "median", "min") else f"{name}%"
        out.append(text(x.start - 10, y + 4, shown, "label", "end"))
        out += [line("stem", x.start, y, x(value), y), dot("fill-packed", x(value), y)]
        out.append(text(WIDTH, y + 4, figure(value), "value", "end"))
    if mean > 0:
        at = x(mean)
        out.append(line("marker", at, 4, at, bottom))
        # Keep clear of the values at the right edge.
        offset, anchor = (-5, "end") if at > (x.start + x.end) / 2 else (5, "start")
        out.append(text(at + offset, bottom - 3, f"mean {figure(mean)}", "tick", anchor))
    summary = ", ".join(f"{name} {figure(value)}" for name, value in values.items())
    return svg(out, bottom + 24, f"KL divergence percentiles, logarithmic axis. Mean {figure(mean)}; {summary}")


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
        return nothing("every model agrees with the baseline exactly", "All values are zero")
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    least, most = min(m.nbytes for m in marks), max(m.nbytes for m in marks)
    pad = 0.12 * (most - least) or 0.12 * most or 1.0
    top, bottom = 12.0, max(210.0, 34.0 * len(marks))
    x = Scale(max(0.0, least - pad), most + pad, 44.0, WIDTH - 8.0)
    y = Scale(10.0**low, 10.0**high, bottom, top, log=True)
    out = []
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        out += [line("grid", x.start, at, x.end, at), text(x.start - 6, at + 4, power(exponent), "tick", "end")]
    for tick in ticks(x.low, x.high):
        out.append(text(x(tick), bottom + 18, units.size(tick), "tick", "middle"))
    out.append(line("axis", x.start, bottom, x.end, bottom))
    for m in marks:
        cx, cy = x(m.nbytes), y(m.kld)
        out.append(line("stem", cx, y(m.kld + 2 * m.error), cx, y(m.kld - 2 * m.error)))
        title = f"{m.name}: {units.size(m.nbytes)}, KL divergence {figure(m.kld)} ± {figure(m.error)}"
        out.append(dot("fill-packed" if m.best else "hollow", cx, cy, title))
    out += beside([(m.name, x(m.nbytes), y(m.kld)) for m in marks], top, bottom)
    summary = "; ".join(
        f"{m.name}: {units.size(m.nbytes)}, {figure(m.kld)}{', on the frontier' if m.best else ''}"
        for m in sorted(marks, key=lambda m: (m.nbytes, m.kld))
    )
    return svg(out, bottom + 26, f"KL divergence, logarithmic, against size on disk. {summary}")
