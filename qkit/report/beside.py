"""Predicted against measured: what was said of a device before anything ran, beside what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .. import units
from ..measure.types import Measured, Profile
from . import tables
from .tables import Table


def table(result: Profile) -> Table | None:
    """A row for each figure that has both; None where none has."""
    named = list(zip(tables.heads(result), tables.rows(result), strict=True))
    lines = [line for name, row in named for line in _lines(name if len(named) > 1 else "", row)]
    return (["", "predicted", "nine in ten", "measured", "error"], lines) if lines else None


def _lines(name: str, row: Measured) -> Iterator[list[str]]:
    found, first = row.predicted or {}, row.speed[0] if row.speed else None
    of = f"{name}: " if name else ""
    if first is not None:
        rates = (("decode", f"decode, bare step, batch {first.batch}", first.decode_tps),
                 ("prefill", f"prefill of {first.prompt:,} tokens", first.prefill_tps))  # fmt: skip
        for key, what, measured in rates:
            if found.get(key):
                yield _line(of + what, found[key], "tokens_per_s", measured, lambda v: f"{v:,.1f} tok/s")
        if found.get("first"):
            what = f"first token after {first.prompt:,}"
            yield _line(of + what, found["first"], "seconds", first.ttft_median, lambda v: f"{v * 1e3:,.1f} ms")
    if found.get("memory") and row.memory.total is not None:
        yield _line(f"{of}memory", found["memory"], "total", row.memory.total, units.size)


def _line(what: str, found: dict[str, Any], key: str, measured: float, shown: Callable[[float], str]) -> list[str]:
    value, low, high = found[key], found.get("low"), found.get("high")
    band = "-"
    if low is not None and high is not None:
        band = f"{shown(low)} to {shown(high)}" + ("" if low <= measured <= high else ", missed")
    return [what, shown(value), band, shown(measured), f"{value / measured - 1:+.0%}" if measured else "-"]
