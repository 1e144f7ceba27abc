"""Predicted against published tokens per second as one SVG: a point a figure, its interval, the line of no error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .fitting import Checked

SIZE, LEFT, BOTTOM = 640, 64, 52
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#334155}.grid{stroke:#cbd5e1}.even{stroke:#64748b;stroke-dasharray:5 4}"
    "@media(prefers-color-scheme:dark){text{fill:#cbd5e1}.grid{stroke:#334155}.even{stroke:#94a3b8}}"
)


def scatter(answers: Sequence[Checked]) -> str:
    values = [v for a in answers for v in (a.predicted.tokens_per_s, a.row.tokens_per_s)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    side = SIZE - LEFT - 16

    def at(value: float) -> float:
        return side * (min(max(math.log10(value), low), high) - low) / (high - low)

    def x(value: float) -> float:
        return LEFT + at(value)

    def y(value: float) -> float:
        return SIZE - BOTTOM - at(value)

    def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
        return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

    least, most = 10.0**low, 10.0**high
    out = []
    for value in (10.0**exponent for exponent in range(low, high + 1)):
        out.append(line("grid", x(value), y(most), x(value), y(least)))
        out.append(line("grid", x(least), y(value), x(most), y(value)))
        out.append(f'<text x="{x(value):.1f}" y="{SIZE - BOTTOM + 18}" text-anchor="middle">{value:,.0f}</text>')
        out.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    out.append(line("even", x(least), y(least), x(most), y(most)))
    names = sorted({a.row.setting.engine.name for a in answers})
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    for a in answers:
        colour, across = colours[a.row.setting.engine.name], x(a.row.tokens_per_s)
        out.append(
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{y(a.predicted.low):.1f}" y2="{y(a.predicted.high):.1f}" '
            f'stroke="{colour}" stroke-opacity=".25"/>'
        )
        title = escape(f"{a.row.words}: predicted {a.predicted.tokens_per_s:,.1f}, published {a.row.tokens_per_s:,.1f}")
        dot = f'cx="{across:.1f}" cy="{y(a.predicted.tokens_per_s):.1f}" r="3" fill="{colour}"'
        out.append(f"<circle {dot}><title>{title}</title></circle>")
    for i, name in enumerate(names):
        out.append(f'<circle cx="{LEFT + 14}" cy="{20 + 16 * i}" r="4" fill="{colours[name]}"/>')
        out.append(f'<text x="{LEFT + 24}" y="{24 + 16 * i}">{escape(name)}</text>')
    out.append(f'<text x="{(LEFT + SIZE) / 2}" y="{SIZE - 12}" text-anchor="middle">published, tokens/s</text>')
    turned = f'transform="translate(16 {SIZE / 2}) rotate(-90)" text-anchor="middle"'
    out.append(f"<text {turned}>predicted, held out, tokens/s</text>")
    label = f"Predicted against published tokens per second: {len(answers)} figures that the fit did not see"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{label}">'
        f"<style>{_STYLE}</style>{''.join(out)}</svg>\n"
    )
