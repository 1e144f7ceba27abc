"""Tables as text: for a terminal, and as Markdown."""

from __future__ import annotations


def cell(text: str) -> str:
    """Text as a cell or a line of Markdown holds it: its marks as they are written, on one line."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def markdown_table(head: list[str], lines: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(cell(c) for c in row) + " |" for row in [head]] + [
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cell(c) for c in row) + " |" for row in lines),
    ]


def plain_table(head: list[str], lines: list[list[str]]) -> list[str]:
    """The lines of a table in columns, two spaces apart."""
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
