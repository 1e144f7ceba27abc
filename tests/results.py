"""Converted folders, compared byte for byte."""

from __future__ import annotations

from pathlib import Path

QUICK = {"calib_samples": 4, "calib_len": 32}


def contents(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
