"""The README's support matrix is the one that the interop tests make."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_the_readme_has_it():
    pytest.importorskip("peft")
    from interop import matrix

    readme = Path(__file__).parents[1] / "README.md"
    assert matrix.table() in readme.read_text(), "run: python tests/interop/matrix.py"
