"""Predicted against measured on this machine's CPU: three models in three formats, as a Markdown table.

    python benchmarks/predicted_measured.py profiles/local-speed.csv [--figures PUBLISHED.csv] [--work DIR]

Speed: figures of benchmarks/local_speed.py in the engine qkit; each is predicted by a fit of all others but those of
its model, with the published ones of --figures where they are given. Memory, with --work: the folders that
local_speed.py made there, each loaded in a process of its own with 512 tokens, against the formula. Error: predicted /
measured - 1; * where the interval that should hold nine in ten does not. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.published import fitting, rows
from benchmarks.published.fitting import Checked
from qkit.estimate.rates import from_dict

PRIOR = Path(__file__).parent / "published" / "prior.json"
MODELS = ("SmolLM2-135M", "Gemma-3-270M", "Made-TinyLlama, 11 layers")
FORMATS = ("W4A16", "W8A16", "BF16")
CONTEXT = 512
POINTS = (("decode", "32"), ("prefill", "512"))  # phase, prompt: what the table has of each model and format


@dataclass(frozen=True)
class Compared:
    """One figure: tokens/s, or bytes. covered: whether the interval holds it; None where there is none."""

    model: str
    format: str
    what: str
    predicted: float
    measured: float
    covered: bool | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def speeds(
    answers: Iterable[Checked], models: Sequence[str] = MODELS, formats: Sequence[str] = FORMATS
) -> list[Compared]:
    """Of the answers those that the table shows."""
    found = []
    for a in answers:
        p = a.row.published
        shown = (p["phase"], p["prompt_len"]) in POINTS and a.row.setting.engine.name == "qkit"
        if shown and p["model"] in models and p["format"] in formats:
            found.append(
                Compared(p["model"], p["format"], p["phase"], a.predicted.tokens_per_s, a.row.tokens_per_s, a.covered)
            )
    return found


def memories(work: Path, models: Sequence[str] = MODELS, formats: Sequence[str] = FORMATS) -> list[Compared]:
    from local_models import candidates

    from qkit.hardware.detect import resolve
    from qkit.measure import footprint, predicted
    from qkit.sources import open_source

    where = resolve("cpu")
    asked = predicted.Asked(prompt=CONTEXT, generated=1, batch=1, context=CONTEXT, largest=1)
    found = []
    for each in candidates(work, models, formats):
        said = predicted.before(open_source(str(each.path)), where, 1.0, asked)
        took = footprint.apart(str(each.path), "cpu", [1 + i % 200 for i in range(CONTEXT)], 1, where.available_bytes)
        if isinstance(took, str):
            raise SystemExit(f"{each.path}: {took}")
        found.append(Compared(each.model, each.format, "memory", said["memory"]["total"], took.total))
    return found


def markdown(found: Sequence[Compared]) -> str:
    """A line for each model and format, in their order; predicted, measured and error of each figure."""
    whats = list(dict.fromkeys(c.what for c in found))
    units = {"decode": "decode, tokens/s", "prefill": "prefill of 512, tokens/s", "memory": "memory, MB"}
    head = [f"{units[what]}: predicted | measured | error" for what in whats]
    lines = [f"| model | format | {' | '.join(head)} |", "|---|---|" + "--:|--:|--:|" * len(whats)]
    by = {(c.model, c.format, c.what): c for c in found}
    for model, format in dict.fromkeys((c.model, c.format) for c in found):
        cells = [_cells(by.get((model, format, what))) for what in whats]
        lines.append(f"| {model} | {format} | {' | '.join(cells)} |")
    for what in whats:
        errors = [abs(c.error) for c in found if c.what == what]
        lines.append(f"\n{units[what]}: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")
    return "\n".join(lines)


def _cells(c: Compared | None) -> str:
    if c is None:
        return " | | "
    scale, form = (1e6, ",.0f") if c.what == "memory" else (1, ",.1f")
    missed = "*" if c.covered is False else ""
    return f"{c.predicted / scale:{form}} | {c.measured / scale:{form}} | {c.error:+.0%}{missed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("local", type=Path, help="figures of local_speed.py")
    parser.add_argument("--figures", type=Path, nargs="*", default=[], help="published figures to fit beside them")
    parser.add_argument("--work", type=Path, metavar="DIR", help="of local_speed.py: memory is measured, too")
    args = parser.parse_args()
    read = [rows.read(path) for path in (args.local, *args.figures)]
    if skipped := [words for _, several in read for words in several]:
        sys.exit("\n".join(skipped))
    (own, _), others = read[0], [row for found, _ in read[1:] for row in found]
    prior = from_dict({**json.loads(PRIOR.read_text(encoding="utf-8")), "terms": {}})
    found = speeds(fitting.each_left_out(own, others, prior))
    if not found:
        sys.exit(f"{args.local} has no figure of qkit with {', '.join(MODELS)} in {', '.join(FORMATS)}")
    if args.work:
        there = [model for model in MODELS if any(c.model == model for c in found)]
        found += memories(args.work, there)
    print(markdown(found))
    print(json.dumps([{**asdict(c), "error": round(c.error, 4)} for c in found]))


if __name__ == "__main__":
    main()
