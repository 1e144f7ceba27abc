"""Predicted against measured: what was said of a model before it ran, beside what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .. import units
from ..measure.types import Measured, Profile
from . import tables
from .tables import Table


def table(result: Profile) -> Table | None:
    """A row for each figure that was predicted; None where none was."""
    named = list(zip(tables.heads(result), tables.rows(result), strict=True))
    lines = [line for name, row in named for line in _lines(name if len(named) > 1 else "", row)]
    head = ["", "predicted", "nine in ten", "measured", "error"]
    return (head, lines) if lines else None


def _lines(name: str, row: Measured) -> Iterator[list[str]]:
    first = row.speed[0] if row.speed else None
    of = f"{name}: " if name else ""
    batch = f", batch {first.batch}" if first else ""
    prompt = f" of {first.prompt:,} tokens" if first else ""
    figures: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("decode", f"decode, bare step{batch}", "tokens_per_s", _rate),
        ("prefill", f"prefill{prompt}{batch}", "tokens_per_s", _rate),
        ("first", f"first token after a prompt{prompt}", "seconds", _ms),
        ("memory", f"memory at {row.memory.tokens:,} tokens x batch {row.memory.batch}", "total", units.size),
        ("weights", "· weights", "bytes", units.size),
        ("kv_cache", "· KV cache", "bytes", units.size),
    )
    for key, what, unit, shown in figures:
        if found := (row.predicted or {}).get(key):
            yield _line(of + what, found, unit, shown)


def _line(what: str, found: dict[str, Any], unit: str, shown: Callable[[float], str]) -> list[str]:
    measured, error, low, high = (found.get(name) for name in ("measured", "error", "low", "high"))
    band = "-"
    if low is not None and high is not None:
        missed = "" if measured is None or low <= measured <= high else ", missed"
        band = f"{shown(low)} to {shown(high)}{missed}"
    return [
        what,
        shown(found[unit]),
        band,
        "not measured" if measured is None else shown(measured),
        "-" if error is None else f"{error:+.1%}",
    ]


def unknown(result: Profile) -> list[list[str]]:
    """(model, why) of what was not predicted."""
    named = zip(tables.heads(result), tables.rows(result), strict=True)
    return [[name, row.predicted["problem"]] for name, row in named if row.predicted and row.predicted["problem"]]


def bases(result: Profile) -> list[tuple[str, str]]:
    """(figure, what its prediction rests on) of the first model."""
    found = result.models[0].predicted
    return list(found["basis"].items()) if found else []


def _rate(value: float) -> str:
    return f"{value:,.1f} tok/s"


def _ms(value: float) -> str:
    return f"{value * 1e3:,.1f} ms"
