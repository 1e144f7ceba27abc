"""Sizes and times as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from .errors import QkitError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, option: str = "size") -> int:
    """Bytes in "16GiB", "500M", "1.5g"; decimal unless the unit has an i. Raises QkitError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not match:
        raise QkitError(f"{option}: {text!r} is not a size", "write it like 16GiB, 500MB or 4g")
    return int(Fraction(match[1]) * _UNITS[(match[2] or "").lower()])


def size(nbytes: float) -> str:
    """1536 -> "1.5 kB" (decimal, as disks are sold and as `ls` in SI mode prints)."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def counted(kinds: Mapping[str, int]) -> str:
    """ "210 x Q4_1, 61 x F32": the most frequent first."""
    return ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
