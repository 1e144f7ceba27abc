"""Profiling: what a model costs in memory, time and quality, measured on the device that is here."""

from __future__ import annotations

from ..report import write
from .endpoint import Endpoint, measure_endpoint, render
from .run import profile
from .types import Profile


def summary(result: Profile | Endpoint) -> str:
    """What the command line prints."""
    return render.summary(result) if isinstance(result, Endpoint) else write.summary(result)


__all__ = ["Endpoint", "Profile", "measure_endpoint", "profile", "summary"]
