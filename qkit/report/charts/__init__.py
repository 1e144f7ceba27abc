"""The report's charts as inline SVG (see `svg` for why). Colours are CSS classes of page.css."""

from __future__ import annotations

from .curves import Bill, Curve, bills, curves
from .memory import Held, Part, limited_bars, stacked_bars
from .quality import Mark, frontier, log_percentiles
from .roofline import Spot, roofline
from .svg import figure
from .times import histogram, rates

__all__ = [
    "Bill", "Curve", "Held", "Mark", "Part", "Spot", "bills", "curves", "figure", "frontier", "histogram",
    "limited_bars", "log_percentiles", "rates", "roofline", "stacked_bars",
]  # fmt: skip
