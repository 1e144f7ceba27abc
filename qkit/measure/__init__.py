"""Profiling: what a model costs in memory, time and quality, measured on the device that is here."""

from __future__ import annotations

from ..estimate.command import summary as predicted_summary
from ..estimate.result import Predicted
from ..report import write
from .endpoint import Endpoint, measure_endpoint, render
from .run import profile
from .types import Profile


def summary(result: Profile | Endpoint | Predicted) -> str:
    """What the command line prints."""
    if isinstance(result, Predicted):
        return predicted_summary(result)
    return render.summary(result) if isinstance(result, Endpoint) else write.summary(result)


__all__ = ["Endpoint", "Predicted", "Profile", "measure_endpoint", "profile", "summary"]
