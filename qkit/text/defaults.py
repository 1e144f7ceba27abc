"""The texts that come with qkit: the same bytes everywhere. See data/NOTICE for where they are from."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

from .read import Text, plain

_DATA = Path(__file__).parent / "data"
_ORIGIN = "cpython-3.11.7"  # whose documentation `benchmarks/default_texts.py` made them of


@cache
def calibration_text() -> Text:
    """The text to calibrate on: the Python language reference, about 340 thousand characters."""
    return _load("calibration", "language-reference")


@cache
def evaluation_text() -> Text:
    """The text to evaluate on: docstrings of the standard library that share no passage with `calibration_text`, about
    320 thousand characters."""
    return _load("evaluation", "library-docstrings")


def _load(file: str, name: str) -> Text:
    return plain(f"{_ORIGIN}/{name}", lzma.decompress((_DATA / f"{file}.txt.xz").read_bytes()).decode("utf-8"))
