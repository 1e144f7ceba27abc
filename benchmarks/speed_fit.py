"""Fits the speed predictor to published figures, and says how far off it is for what it has not seen.

    python benchmarks/speed_fit.py FIGURES.csv                 # fit, write profiles/speed.json, print the tables
    python benchmarks/speed_fit.py FIGURES.csv --check         # the tables alone; nothing is written
    python benchmarks/speed_fit.py FIGURES.csv profiles/local-speed.csv      # fitted to both
    python benchmarks/speed_fit.py --score OTHER.csv           # what is shipped against other figures
    ... --plot FILE.svg                                        # predicted against published, one point a figure

Columns of a file: `published/rows.py`. Held out: figures are divided into three parts, each predicted by a fit of the
other two; all figures of one group (a model with an engine and a device; a model; a device; an engine) are in one.
The held-out tables are of the first file alone, whatever else is fitted; of each further one (local-speed.csv, by
benchmarks/local_speed.py) a table says how a fit of all figures but those of the same model predicts it.
Intervals are meant to hold nine in ten. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.published import fitting, plot, rows
from benchmarks.published.fitting import Checked, Row
from qkit.estimate.rates import as_dict, fitted, from_dict
from qkit.hardware.catalogue import profile_path

PRIOR = Path(__file__).parent / "published" / "prior.json"
GROUPS: dict[str, Callable[[Row], str]] = {
    "engine": lambda r: r.setting.engine.name,
    "device": lambda r: r.setting.device.name,
    "kind": lambda r: r.load.kind,
}


def summary(answers: Sequence[Checked]) -> dict[str, float]:
    errors = sorted(abs(a.error) for a in answers)
    return {
        "figures": len(answers),
        "median_error": round(statistics.median(errors), 4),
        "p80_error": round(errors[int(0.8 * (len(errors) - 1))], 4),
        "covered": round(sum(a.covered for a in answers) / len(answers), 4),
        "interval": round(statistics.median(a.predicted.high / a.predicted.tokens_per_s for a in answers), 3),
    }


def line(name: str, answers: Sequence[Checked]) -> str:
    s = summary(answers)
    return (
        f"| {name} | {s['figures']} | {s['median_error']:.1%} | {s['p80_error']:.0%} | {s['covered']:.0%} | "
        f"x {s['interval']:.2f} |"
    )


def table(title: str, lines: Sequence[str]) -> str:
    head = [
        f"| {title} | figures | median error | 80 % within | interval holds | interval |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *lines, ""])


def by(answers: Sequence[Checked], group: Callable[[Row], str]) -> list[str]:
    groups: dict[str, list[Checked]] = {}
    for answer in answers:
        groups.setdefault(group(answer.row), []).append(answer)
    return [line(name, found) for name, found in sorted(groups.items(), key=lambda item: -len(item[1]))]


def worst(answers: Sequence[Checked], count: int = 10) -> str:
    ordered = sorted(answers, key=lambda a: -max(a.error, 1 / (1 + a.error) - 1))[:count]
    return "\n".join(
        f"- {a.row.words}: {a.predicted.tokens_per_s:,.1f} predicted, {a.row.tokens_per_s:,.1f} published"
        for a in ordered
    )


def _all_of(path: Path) -> list[Row]:
    found, skipped = rows.read(path)
    if skipped:
        sys.exit("\n".join(skipped))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--score", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.score:
        found, skipped = rows.read(args.score)
        print("\n".join(f"not understood: {words}" for words in skipped), file=sys.stderr)
        answers = fitting.check(found, fitted())
        print(table("all", [line("all", answers)]))
        for title, group in GROUPS.items():
            print(table(title, by(answers, group)))
        print("Farthest off:\n" + worst(answers))
        document: dict[str, object] = {"score": summary(answers), "unknown": len(found) - len(answers)}
    elif args.figures:
        files = [_all_of(path) for path in args.figures]
        found, further = files[0], files[1:]
        prior = from_dict({**json.loads(PRIOR.read_text(encoding="utf-8")), "terms": {}})
        lines, answers, document = [], [], {}
        for split in fitting.SPLITS:
            for seed in range(args.seeds):
                parts = fitting.held_out(found, prior, split, seed)
                whole = [a for part in parts for a in part]
                lines.append(
                    line(f"a third of each {split}" if args.seeds == 1 else f"{split}, division {seed}", whole)
                )
                document[f"{split} {seed}"] = summary(whole)
                if split == next(iter(fitting.SPLITS)) and not seed:
                    answers = whole
        print(table("held out", lines))
        for title, group in GROUPS.items():
            print(table(f"{title}, of the first division", by(answers, group)))
        print("Farthest off, of the first division:\n" + worst(answers))
        for path, own in zip(args.figures[1:], further, strict=True):
            others = [row for each in files if each is not own for row in each]
            left = fitting.each_left_out(own, others, prior)
            print("\n" + table(f"{path.name}, each model left out", [line("all", left)]))
            for title, group in (*GROUPS.items(), ("model", fitting.SPLITS["model"])):
                print(table(f"{title}, of {path.name}", by(left, group)))
            document[path.name] = summary(left)
        if not args.check:
            counted = " and ".join(
                f"{len(each)} figures of {path.name}" for path, each in zip(args.figures, files, strict=True)
            )
            made = replace(
                fitting.fit([row for each in files for row in each], prior),
                source=f"{counted}, by benchmarks/speed_fit.py",
            )
            target = profile_path("speed.json")
            target.write_text(json.dumps(as_dict(made), indent=1) + "\n", encoding="utf-8")
            print(f"\nwrote {target}")
    else:
        parser.error("name a file of figures, or --score")
    if args.plot:
        args.plot.write_text(plot.scatter(answers), encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
