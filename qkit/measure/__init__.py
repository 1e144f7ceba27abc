"""Profiling: what a model costs in memory, time and quality, measured on the device that is here."""

from __future__ import annotations

from ..report.write import summary
from .run import profile
from .types import Profile

__all__ = ["Profile", "profile", "summary"]
