"""A model in an engine, over batch sizes and contexts: prefill and decode, in the engine's own process."""

from __future__ import annotations

from .plan import CONTEXTS, GENERATED, plan
from .sweep import sweep
from .types import Achieved, Point, Sweep, achieved

__all__ = ["CONTEXTS", "GENERATED", "Achieved", "Point", "Sweep", "achieved", "plan", "sweep"]
