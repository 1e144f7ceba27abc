"""The table of published logs: the estimate agrees with each, or the row says why it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.published import memory

ROWS = memory.read()
FOUND = memory.compare(ROWS)


def test_the_table_is_large_and_every_row_has_its_source_and_a_figure():
    assert len(ROWS) >= 40
    figures = [c for c in ROWS[0] if c.endswith(("_gib", "_mib", "kv_tokens")) and c != "total_gib"]
    for row in ROWS:
        assert urlsplit(row["source"]).netloc and any(row[name] for name in figures), row
    assert {row["engine"] for row in ROWS} == {"vllm", "llama.cpp"}


@pytest.mark.parametrize("found", [c for c in FOUND if c.limit and not c.outlier], ids=lambda c: f"{c.part}: {c.words}")
def test_within_the_limit(found):
    assert abs(found.error) <= found.limit


def test_outliers_are_few_have_reasons_and_are_outliers():
    limited = [c for c in FOUND if c.limit]
    outliers = [c for c in limited if c.outlier]
    assert len(outliers) <= len(limited) / 6
    assert all(abs(c.error) > c.limit for c in outliers), [c.words for c in outliers if abs(c.error) <= c.limit]


def test_activations_of_vllm():
    """With a known step: the peak that vLLM profiles."""
    errors = sorted(abs(c.error) for c in FOUND if c.part == "activations" and not c.outlier)
    assert len(errors) >= 6 and errors[len(errors) // 2] <= 0.02 and errors[-1] <= 0.2
