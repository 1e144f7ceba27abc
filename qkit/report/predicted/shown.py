"""How a prediction's figures are written."""

from __future__ import annotations

from ...estimate.answer import First
from ...estimate.speed import Prediction


def rate(p: Prediction) -> str:
    """ "47 tokens/s (34 to 64)": with the interval that holds nine in ten."""
    return f"{number(p.tokens_per_s)} tokens/s ({number(p.low)} to {number(p.high)})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def interval(f: First) -> str:
    return f"{seconds(f.low)} to {seconds(f.high)}"


def tokens(n: int | None) -> str:
    return "none" if n is None else f"{n:,}"


def dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"


def market(source: str) -> str:
    """Of a price's source the market and the date; the rest stands in JSON and HTML."""
    return source.partition(" (")[0]
