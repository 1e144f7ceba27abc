"""What a prediction gives: estimates of one model or several, and where its report lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .document import document
from .estimate import Estimate


@dataclass(frozen=True)
class Predicted:
    """The result of a prediction. `as_dict` is the JSON document.

    estimates   one a model
    provenance  command, versions, date, what the speeds were fitted on
    failures    thresholds that are missed: not empty, the exit code is 1
    out         folder of the report
    """

    estimates: tuple[Estimate, ...]
    provenance: dict[str, Any]
    thresholds: dict[str, float]
    failures: tuple[str, ...]
    out: str

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": "predicted",
            "passed": self.passed,
            **document(self.estimates),
            "provenance": self.provenance,
            "thresholds": self.thresholds,
            "failures": list(self.failures),
            "out": self.out,
        }
