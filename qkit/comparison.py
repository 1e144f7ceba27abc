"""`compare`: what changed between two profiles, from their JSON documents, and whether it is more than was allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import QkitError
from .options import number, option, with_options
from .report import schema
from .report.figures import FIGURES, KLD, MEMORY, RATES, Document, rows, setting, short
from .storage.files import read_json
from .storage.local import at

SIGMAS = 2  # standard errors of a difference that are more than chance


@dataclass(frozen=True)
class Options:
    """What may change, and how it is shown."""

    max_kld_increase: float | None = option(
        None, "exit with 1 if the mean KL divergence rises by more than X", parse=number, metavar="X"
    )
    max_slowdown: float | None = option(
        None,
        "exit with 1 if generate, predicted decode or a server's output gets slower by more than PCT percent",
        parse=number,
        metavar="PCT",
    )
    max_memory_increase: float | None = option(
        None, "exit with 1 if the memory rises by more than PCT percent", parse=number, metavar="PCT"
    )
    markdown: bool = option(False, "print a summary for a pull request")


def _finite(value: float) -> float | None:
    """None for what no report could hold: of numbers at the ends of what a float can be."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Change:
    """One figure before and after. None where a report does not have it.

    unit      bytes, seconds, tokens/s, tokens, dollars, share, or nothing
    error     standard error of after - before; None where the figure is exact or its error unknown
    note      why the two cannot be held against each other; "" where they can
    """

    figure: str
    unit: str
    before: float | None
    after: float | None
    error: float | None
    note: str

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else _finite(self.after - self.before)

    @property
    def relative(self) -> float | None:
        difference = self.difference
        return None if difference is None or not self.before else _finite(difference / self.before)

    @property
    def verdict(self) -> str:
        """Whether the difference is more than chance, where that is known."""
        if self.note or self.difference is None:
            return self.note or "not in both reports"
        if self.error is None:
            return "" if self.difference else "the same"
        return "beyond the error" if abs(self.difference) > SIGMAS * self.error else "within the error"


@dataclass(frozen=True)
class Pair:
    """One model in both reports, or one on one device."""

    before: str
    after: str
    changes: tuple[Change, ...]

    def __getitem__(self, figure: str) -> Change:
        return next(change for change in self.changes if change.figure == figure)


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. unpaired: what only one of the reports has; failures: thresholds that are
    missed, or cannot be held; not empty, the exit code is 1."""

    pairs: tuple[Pair, ...]
    unpaired: tuple[str, ...]
    thresholds: dict[str, float]
    failures: tuple[str, ...]
    markdown: bool

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        pairs = [
            {
                "before": pair.before,
                "after": pair.after,
                "changes": [
                    {**asdict(c), "difference": c.difference, "relative": c.relative, "verdict": c.verdict}
                    for c in pair.changes
                ],
            }
            for pair in self.pairs
        ]
        return {
            "kind": "comparison",
            "passed": self.passed,
            "pairs": pairs,
            "unpaired": list(self.unpaired),
            "thresholds": self.thresholds,
            "failures": list(self.failures),
        }


@with_options(Options)
def compare(before: str | os.PathLike[str], after: str | os.PathLike[str], options: Options) -> Comparison:
    """Compare two documents that `qkit profile` wrote as profile.json, or endpoint.json.

    A report of one model is compared with one of one model; of several, models are paired by their names, predictions
    by model and device, a server's levels by concurrency. Figures that were measured on another device, another text
    or against another baseline, or predicted for another context, batch or engine, are shown and not held against each
    other.
    Raises QkitError for a file that is no such document, one of another version, and two of different kinds.
    """
    documents = _read(before), _read(after)
    kinds = [document["kind"] for document in documents]
    if kinds[0] != kinds[1]:
        said = {"measured": "measured", "predicted": "predicted", "endpoint": "of a running server"}
        raise QkitError(
            f"one report is {said[kinds[0]]}, the other {said[kinds[1]]}",
            "compare two of a kind; a report that was measured shows what was predicted for its device beside it",
        )
    held = _held(kinds[0])
    for name in (f.name for f in fields(Options) if f.name.startswith("max_") and f.name not in held):
        if getattr(options, name) is not None:
            lacking = "nothing predicts quality" if kinds[0] == "predicted" else "a server's load says nothing of it"
            raise QkitError(f"--{name.replace('_', '-')} is for a model that was measured: {lacking}", "leave it out")
    named, unpaired = _pairs(*documents)
    pairs = tuple(_pair(*documents, names) for names in named)
    limits = {name: value for name in held if (value := getattr(options, name)) is not None}
    failures = [failure for pair in pairs for failure in _failures(pair, limits, held, len(pairs) > 1)]
    failures += [f"{name} is in one report only" for name in unpaired] if limits else []
    return Comparison(pairs, tuple(unpaired), limits, tuple(failures), options.markdown)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A profile's document, checked against the schema."""
    hint = "name the profile.json of a folder that qkit profile wrote, or the endpoint.json"
    place = Path(path)
    if place.is_dir():
        served = place / "endpoint.json"
        place = served if served.exists() and not (place / "profile.json").exists() else place / "profile.json"
    try:
        found = read_json(at(place.parent), place.name)
    except QkitError as error:
        raise QkitError(error.message, hint) from None
    if found.get("kind") not in schema.KINDS or "schema_version" not in found:
        raise QkitError(f"{place} is not a report of qkit profile", hint)
    written = found["schema_version"]
    if written != schema.version():
        newer = isinstance(written, int) and written > schema.version()
        raise QkitError(
            f"{place} is a report of schema version {written}, and this qkit compares version {schema.version()}",
            "upgrade qkit" if newer else "make the report again with this qkit",
        )
    wrong = schema.problems(found)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise QkitError(f"{place} is a damaged report: {wrong[0]}{more}", hint)
    return found


def _pairs(before: Document, after: Document) -> tuple[list[tuple[str, str]], list[str]]:
    """(names of what is compared, names of what has no other)."""
    ours, theirs = rows(before), rows(after)
    if len(ours) == len(theirs) == 1:
        return [(next(iter(ours)), next(iter(theirs)))], []
    common = [name for name in ours if name in theirs]
    if not common:
        raise QkitError(
            f"the reports have nothing in common: {', '.join(ours)}, and {', '.join(theirs)}",
            "of several, those of one name are compared",
        )
    return [(name, name) for name in common], [name for each in (ours, theirs) for name in each if name not in common]


def _pair(before: Document, after: Document, names: tuple[str, str]) -> Pair:
    ours, theirs = rows(before)[names[0]], rows(after)[names[1]]
    settings = setting(before, ours), setting(after, theirs)
    changes = []
    for figure in FIGURES[before["kind"]]:
        (old, old_error), (new, new_error) = figure.of(before, ours), figure.of(after, theirs)
        different = [name for name in figure.needs if settings[0][name] != settings[1][name]]
        note = f"not the same {' and '.join(different)}" if different and None not in (old, new) else ""
        error = None
        if old_error is not None and new_error is not None:
            # Of two measurements on the same tokens; as if they were independent, which is on the safe side.
            error = _finite(math.hypot(old_error, new_error))
        changes.append(Change(figure.name, figure.unit, old, new, error, note))
    return Pair(ours["name"], theirs["name"], tuple(changes))


def _held(kind: str) -> dict[str, str]:
    """Threshold -> the figure that it is held against."""
    found = {"max_slowdown": RATES[kind]}
    if kind != "endpoint":
        found["max_memory_increase"] = MEMORY
    return {"max_kld_increase": KLD, **found} if kind == "measured" else found


def _failures(pair: Pair, limits: Mapping[str, float], held: Mapping[str, str], named: bool) -> list[str]:
    found = []
    of = f"{short(pair.after)}: " if named else ""
    for name, figure in held.items():
        if name not in limits:
            continue
        change, limit = pair[figure], limits[name]
        flag = f"--{name.replace('_', '-')} {limit:g}"
        if change.note or change.difference is None:
            found.append(f"{of}{figure} cannot be held against {flag}: {change.verdict}")
        elif name == "max_kld_increase" and change.difference > limit:
            found.append(f"{of}{figure} rose by {change.difference:.4g} ({change.verdict}), more than {flag}")
        elif name != "max_kld_increase":
            worse = 100 * (change.relative or 0.0) * (-1 if name == "max_slowdown" else 1)
            if worse > limit:
                what = "is slower by" if name == "max_slowdown" else "rose by"
                found.append(f"{of}{figure} {what} {worse:.1f} %, more than {flag}")
    return found
