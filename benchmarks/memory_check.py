"""Holds the memory estimate against published logs, part by part.

    python benchmarks/memory_check.py [--figures published.csv]

Without options: the logs of benchmarks/published/memory.csv (vLLM, llama.cpp). --figures: a table with the columns of
`published.rows` and vram_gib, the most that torch had allocated: weights, KV cache and activations of transformers.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from published import memory, vram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, metavar="FILE")
    figures = parser.parse_args().figures
    json.dump(_logs() if figures is None else _vram(figures), sys.stdout)
    print()


def _logs() -> dict[str, object]:
    found = memory.compare(memory.read())
    for c in found:
        over = c.limit is not None and abs(c.error) > c.limit
        note = f"  outlier: {c.outlier}" if c.outlier else "  OVER THE LIMIT" if over else ""
        print(f"{c.part:18} {c.published:11.3f} {c.predicted:11.3f} {c.error:+7.1%}  {c.words}{note}")
    parts = dict.fromkeys(c.part for c in found)
    result = {}
    for part in parts:
        errors = [abs(c.error) for c in found if c.part == part and not c.outlier]
        outliers = sum(c.part == part and bool(c.outlier) for c in found)
        if errors:
            result[part] = {
                "figures": len(errors), "outliers": outliers,
                "median_error": round(statistics.median(errors), 4), "largest": round(max(errors), 4),
            }  # fmt: skip
    return result


def _vram(path: Path) -> dict[str, object]:
    found = vram.compare(path)
    for c in found:
        print(f"{c.published:8.2f} {c.predicted:8.2f} {c.error:+7.1%}  {c.words}")
    result = {}
    for engine in dict.fromkeys(c.engine for c in found):
        errors = [abs(c.error) for c in found if c.engine == engine]
        result[engine] = {
            "figures": len(errors), "median_error": round(statistics.median(errors), 4),
            "largest": round(max(errors), 4),
        }  # fmt: skip
    return result


if __name__ == "__main__":
    main()
