"""Fits the terms of `qkit.estimate.rates` to published figures, and holds the predictor against figures left out.

The fit is the maximum a posteriori of a model that is linear around its optimum: Gauss-Newton on log tokens/s with
normal priors on the terms, where figures far off count less (weights of Student's t), and the Laplace approximation for
the terms' standard deviations.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qkit.estimate import speed
from qkit.estimate.rates import Fitted, Term

from .rows import Row

_STEP = 1e-4
_FAR = 2.5  # standard deviations from which on a figure counts less
_ROUNDS = 20


def fit(rows: Sequence[Row], prior: Fitted) -> Fitted:
    """The terms that `rows` speak of. prior: base, spread and noise."""
    if not rows:
        return replace(prior, terms={})
    terms: dict[Term, int] = {}
    owns = []
    for row in rows:
        own = {q: [t for t in ts if prior.spread[q].get(t[1])] for q, ts in row.setting.terms().items()}
        owns.append({q: [terms.setdefault(t, len(terms)) for t in ts] for q, ts in own.items()})
    spread = np.array([prior.spread[q][level] for q, level, _ in terms])
    noise = np.array([prior.noise[row.load.kind] for row in rows])
    measured = np.log([row.tokens_per_s for row in rows])
    values = np.zeros(len(terms))
    for _ in range(_ROUNDS):
        slopes = np.zeros((len(rows), len(terms)))
        errors = np.zeros(len(rows))
        for i, (row, own) in enumerate(zip(rows, owns, strict=True)):
            logs = {q: prior.base_of(q, row.setting.engine.family) + values[ks].sum() for q, ks in own.items()}
            log, by = _slopes(row, logs)
            errors[i] = (log - measured[i]) / noise[i]
            for q, ks in own.items():
                slopes[i, ks] += by[q] / noise[i]
        weight = 1 / (1 + (errors / _FAR) ** 2)
        precision = slopes.T @ (slopes * weight[:, None]) + np.diag(1 / spread**2)
        move = -np.linalg.solve(precision, slopes.T @ (weight * errors) + values / spread**2)
        largest = float(np.abs(move).max())
        values += move * min(1.0, 0.5 / largest)
        if largest < 2e-3:
            break
    deviation = np.sqrt(np.diag(np.linalg.inv(precision)))
    return replace(prior, terms={t: (float(values[k]), float(deviation[k])) for t, k in terms.items()})


def _slopes(row: Row, logs: dict[str, float]) -> tuple[float, dict[str, float]]:
    """(log tokens/s, its slope along each log rate)."""
    how = speed.manner(row.setting)
    has = speed.ceilings(row.setting.device, row.setting.count, row.setting.kernel, row.setting.engine, row.threads)
    assert has is not None

    def log(at: dict[str, float]) -> float:
        tokens, seconds, _ = speed.seconds(row.work, has, how, at, row.load, row.room)
        return math.log(tokens / seconds)

    here = log(logs)
    return here, {q: (log({**logs, q: logs[q] + _STEP}) - here) / _STEP for q in logs}


SPLITS: dict[str, Callable[[Row], str]] = {
    "model, engine and device": lambda r: f"{r.published['model']}|{r.published['engine']}|{r.published['gpu']}",
    "model": lambda r: r.published["model"],
    "device": lambda r: r.setting.device.id,
    "engine": lambda r: r.setting.engine.name,
}


@dataclass(frozen=True)
class Checked:
    """A figure that the fit did not see. error: predicted / published - 1."""

    row: Row
    predicted: speed.Prediction

    @property
    def error(self) -> float:
        return self.predicted.tokens_per_s / self.row.tokens_per_s - 1

    @property
    def covered(self) -> bool:
        return self.predicted.low <= self.row.tokens_per_s <= self.predicted.high


def check(rows: Sequence[Row], found: Fitted) -> list[Checked]:
    answers = [speed.predict(r.work, r.setting, r.load, room=r.room, threads=r.threads, fit=found) for r in rows]
    return [Checked(row, answer) for row, answer in zip(rows, answers, strict=True) if answer is not None]


def held_out(rows: Sequence[Row], prior: Fitted, split: str, seed: int = 0, folds: int = 3) -> list[list[Checked]]:
    """For each of `folds` parts, predictions by a fit of the other parts. A part holds whole groups: all figures of one
    model, engine and device, or of one device, are in the same."""
    part = [zlib.crc32(f"{seed}|{SPLITS[split](row)}".encode()) % folds for row in rows]
    answers = []
    for k in range(folds):
        found = fit([row for row, at in zip(rows, part, strict=True) if at != k], prior)
        answers.append(check([row for row, at in zip(rows, part, strict=True) if at == k], found))
    return answers


def each_left_out(rows: Sequence[Row], others: Sequence[Row], prior: Fitted, split: str = "model") -> list[Checked]:
    """Predictions of `rows`, those of each group by a fit of all other figures: of `others`, and of the other groups.

    Of `others` nothing of the group counts either: a model that both have is seen in none."""
    group = SPLITS[split]
    answers = []
    for name in dict.fromkeys(group(row) for row in rows):
        found = fit([row for row in (*others, *rows) if group(row) != name], prior)
        answers += check([row for row in rows if group(row) == name], found)
    return answers
