"""Times as they were measured, and rates as they are predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from .svg import WIDTH, Scale, dot, line, nothing, rect, short, svg, text


def histogram(series: Sequence[tuple[str, str, Sequence[float]]], bins: int = 36) -> Markup:
    """Distributions of seconds on one axis in ms, one below the other: (CSS class, name, values).

    The axis ends at the largest p99 and a little more; the tail beyond it is counted in the last bin.
    """
    import numpy as np

    arrays = [np.asarray(values) * 1e3 for _, _, values in series]
    start = 0.0 if len(arrays) > 1 else max(0.0, min(float(a.min()) for a in arrays) * 0.9)
    end = max(float(np.percentile(a, 99)) for a in arrays) * 1.08
    x = Scale(start, end if end > start else start + 1.0, 0.0, WIDTH)
    height, width, y, out, notes = 64, WIDTH / bins, 0.0, [], []
    for (css, name, _), array in zip(series, arrays, strict=True):
        counts, _ = np.histogram(np.clip(array, x.low, x.high), bins=bins, range=(x.low, x.high))
        p50, p99 = float(np.percentile(array, 50)), float(np.percentile(array, 99))
        note = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        notes.append(f"{name}: {note}")
        shown = short(name, int((WIDTH - 8 * len(note)) / 8) - 1)
        out += [text(0, y + 14, shown, "label"), text(WIDTH, y + 14, note, "value", "end")]
        base = y + 24 + height
        for i, count in enumerate(counts):
            if count:
                tall = max(2.0, height * count / counts.max())
                out.append(rect(f"fill-{css}", i * width + 0.5, base - tall, width - 1, tall, radius=1.5))
        out += [line("marker", x(value), y + 22, x(value), base) for value in (p50, p99)]
        out.append(line("axis", 0, base, WIDTH, base))
        y = base + 12
    for i in range(5):
        value = x.low + (x.high - x.low) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        shown = f"{value:.0f}" if x.high - x.low >= 20 else f"{value:.1f}"
        out.append(text(x(value), y + 4, f"{shown} ms", "tick", anchor))
    return svg(out, y + 12, "Time per output token. " + "; ".join(notes))


def rates(rows: Sequence[tuple[str, float, float, float]], what: str, row: float = 24) -> Markup:
    """A dot for each rate and a line for its interval, on a logarithmic axis: (name, value, low, high)."""
    if not rows:
        return nothing("nothing is known", f"{what}: nothing is known")
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    left = min(170.0, 8.2 * max(len(r[0]) for r in rows) + 10)
    x = Scale(low / 1.06, high * 1.06, left, WIDTH - 52, log=True)
    bottom = 6 + row * len(rows)
    out, shown = [], -math.inf
    for tick in x.ticks:
        name = f"{tick:,.0f}" if tick >= 1 else f"{tick:g}"
        if x(tick) - 4 * len(name) < shown + 6:
            continue
        shown = x(tick) + 4 * len(name)
        out += [line("grid", x(tick), 2, x(tick), bottom), text(x(tick), bottom + 16, name, "tick", "middle")]
    for i, (name, value, least, most) in enumerate(rows):
        y = 6 + row * (i + 0.5)
        words = f"{name}: {amount(value)}, nine in ten {amount(least)} to {amount(most)}"
        out.append(text(0, y + 4, short(name, int((left - 8) / 7.4)), "label"))
        out += [line("stem", x(least), y, x(most), y), dot("fill-packed", x(value), y, words, 4.5)]
        out.append(text(WIDTH, y + 4, amount(value), "value", "end"))
    summary = "; ".join(f"{n} {amount(v)} ({amount(a)} to {amount(b)})" for n, v, a, b in rows)
    return svg(out, bottom + 24, f"{what}, logarithmic axis, with the interval that holds nine in ten. {summary}")


def amount(value: float) -> str:
    """Tokens a second."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
