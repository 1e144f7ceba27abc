"""A table, which is a header and rows of text, as Markdown and for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def cell(text: str) -> str:
    """Text that is no markup, in one line."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell(c) for c in row) + " |" for row in [head]] + [
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cell(c) for c in row) + " |" for row in lines),
    ]


def plain(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def fenced(text: str) -> list[str]:
    """Text as it is, in a fence that is longer than any in it."""
    runs = "".join(c if c == "`" else " " for c in text).split()
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return [fence, text, fence]


def thresholds_met(thresholds: Mapping[str, float], flag: str = "") -> str:
    """What is said where all held; nothing where there are none. flag: what stands before each name."""
    met = ", ".join(f"{flag}{name.replace('_', '-')} {value:g}" for name, value in thresholds.items())
    return f"Thresholds met: {met}" if met else ""


def as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
