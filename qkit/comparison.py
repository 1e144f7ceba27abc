"""`compare`: what changed between two profiles, from their JSON documents, and whether it is more than was allowed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import QkitError
from .options import number, option, with_options

SCHEMA_VERSION = 3  # of the documents that are read; a test holds it against the one that is written
SIGMAS = 2  # standard errors of a difference that are more than chance


@dataclass(frozen=True)
class Options:
    """What may change, and how it is shown."""

    max_kld_increase: float | None = option(
        None, "exit with 1 if the mean KL divergence rises by more than X", parse=number, metavar="X"
    )
    max_slowdown: float | None = option(
        None, "exit with 1 if generate gets slower by more than PCT percent", parse=number, metavar="PCT"
    )
    max_memory_increase: float | None = option(
        None, "exit with 1 if the memory rises by more than PCT percent", parse=number, metavar="PCT"
    )
    markdown: bool = option(False, "print a summary for a pull request")


@dataclass(frozen=True)
class Change:
    """One figure before and after. None where a report does not have it.

    unit      bytes, seconds, tokens/s, share, or nothing
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
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def relative(self) -> float | None:
        difference = self.difference
        return None if difference is None or not self.before else difference / self.before

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
    """One model in both reports."""

    before: str
    after: str
    changes: tuple[Change, ...]

    def __getitem__(self, figure: str) -> Change:
        return next(change for change in self.changes if change.figure == figure)


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. unpaired: models that only one of the reports has; failures: thresholds that are
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


KLD, RATE, MEMORY = "mean KL divergence", "generate", "memory"


@with_options(Options)
def compare(before: str | os.PathLike[str], after: str | os.PathLike[str], options: Options) -> Comparison:
    """Compare two documents that `qkit profile` wrote as profile.json.

    A report of one model is compared with one of one model; of several, models are paired by their names. Figures that
    were measured on another device, another text or against another baseline are shown and not held against each other.
    Raises QkitError for a file that is no such document, or one of another version.
    """
    documents = _read(before), _read(after)
    named, unpaired = _pairs(*documents)
    pairs = tuple(_pair(*documents, *models) for models in named)
    limits = {
        name: value
        for name in ("max_kld_increase", "max_slowdown", "max_memory_increase")
        if (value := getattr(options, name)) is not None
    }
    failures = [failure for pair in pairs for failure in _failures(pair, limits, len(pairs) > 1)]
    failures += [f"{name} is in one report only" for name in unpaired] if limits else []
    return Comparison(pairs, tuple(unpaired), limits, tuple(failures), options.markdown)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A profile's document, its version and its parts checked."""
    hint = "name the profile.json of a folder that qkit profile wrote"
    place = Path(path)
    if place.is_dir():
        place = place / "profile.json"
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise QkitError(f"{place} cannot be read: {error.strerror}", hint) from None
    except ValueError as error:
        raise QkitError(f"{place} is not JSON: {error}", hint) from None
    if not isinstance(found, dict) or found.get("kind") != "measured" or "schema_version" not in found:
        raise QkitError(f"{place} is not a report of qkit profile", hint)
    version = found["schema_version"]
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise QkitError(
            f"{place} is a report of schema version {version}, and this qkit compares version {SCHEMA_VERSION}",
            "upgrade qkit" if newer else "measure the model again with this qkit",
        )
    try:
        for model in found["models"]:
            for figure in _FIGURES:
                figure.of(found, model)
        _setting(found, found["models"][0])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise QkitError(f"{place} is a damaged report: {type(error).__name__}: {error}", hint) from None
    return found


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[tuple[Any, Any]], list[str]]:
    """(models to compare, names of those that have no other)."""
    ours, theirs = before["models"], after["models"]
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])], []
    by_name = [{short(model["name"]): model for model in models} for models in (ours, theirs)]
    common = [name for name in by_name[0] if name in by_name[1]]
    if not common:
        raise QkitError(
            f"the reports have no model in common: {', '.join(by_name[0])}, and {', '.join(by_name[1])}",
            "of several models those of one name are compared",
        )
    rest = [name for names in by_name for name in names if name not in common]
    return [(by_name[0][name], by_name[1][name]) for name in common], rest


def short(name: str) -> str:
    return Path(name.rstrip("/")).name or name


@dataclass(frozen=True)
class _Figure:
    """of(document, model) -> (value, standard error), either None where it is unknown. needs: parts of the setting that
    have to be the same."""

    name: str
    unit: str
    needs: tuple[str, ...]
    of: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float | None, float | None]]


def _scores(document: Mapping[str, Any], model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    quality = model["quality"]
    return quality["protocols"][document["provenance"]["headline_protocol"]] if quality else None


def _estimate(name: str, against: bool = True) -> Callable[[Any, Any], tuple[float | None, float | None]]:
    def of(document: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[float | None, float | None]:
        found = _scores(document, model)
        if found is not None and against:
            found = found["against"]
        return (None, None) if found is None else (found[name]["value"], found[name]["error"])

    return of


def _speed(name: str) -> Callable[[Any, Any], tuple[float | None, float | None]]:
    return lambda document, model: (model["speed"][0][name] if model["speed"] else None, None)


_TEXT = ("text", "protocol")
_FIGURES = (
    _Figure("size on disk", "bytes", (), lambda document, model: (model["stored_bytes"], None)),
    _Figure("bits per weight", "", (), lambda document, model: (model["bits_per_weight"], None)),
    _Figure(KLD, "", (*_TEXT, "baseline"), _estimate("kld")),
    _Figure("top-1 agreement", "share", (*_TEXT, "baseline"), _estimate("same_top")),
    _Figure("perplexity", "", _TEXT, _estimate("perplexity", against=False)),
    _Figure(RATE, "tokens/s", ("device", "prompt", "batch"), _speed("generate_tps")),
    _Figure("time to first token", "seconds", ("device", "prompt", "batch"), _speed("ttft_median")),
    _Figure(MEMORY, "bytes", ("device", "context"), lambda document, model: (model["memory"]["total"], None)),
)


def _setting(document: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What figures were measured with: they compare only where it is the same."""
    text, device, memory = document["text"], document["device"], model["memory"]
    first = model["speed"][0] if model["speed"] else {"batch": None, "prompt": None}
    baseline = document["baseline"]
    return {
        "text": (text["sha256"], text["chunks"], text["n_ctx"], text["bos"]),
        "protocol": document["provenance"]["headline_protocol"],
        "baseline": baseline["fingerprint"] if baseline else None,
        "device": (device["name"], device["threads"]),
        "context": (memory["tokens"], memory["batch"]),
        "prompt": first["prompt"],
        "batch": first["batch"],
    }


def _pair(before: Mapping[str, Any], after: Mapping[str, Any], ours: Any, theirs: Any) -> Pair:
    settings = _setting(before, ours), _setting(after, theirs)
    changes = []
    for figure in _FIGURES:
        (old, old_error), (new, new_error) = figure.of(before, ours), figure.of(after, theirs)
        different = [name for name in figure.needs if settings[0][name] != settings[1][name]]
        note = f"not the same {' and '.join(different)}" if different and None not in (old, new) else ""
        error = None
        if old_error is not None and new_error is not None:
            # Of two measurements on the same tokens; as if they were independent, which is on the safe side.
            error = math.hypot(old_error, new_error)
        changes.append(Change(figure.name, figure.unit, old, new, error, note))
    return Pair(ours["name"], theirs["name"], tuple(changes))


def _failures(pair: Pair, limits: Mapping[str, float], named: bool) -> list[str]:
    found = []
    of = f"{short(pair.after)}: " if named else ""
    for name, figure in (("max_kld_increase", KLD), ("max_slowdown", RATE), ("max_memory_increase", MEMORY)):
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
