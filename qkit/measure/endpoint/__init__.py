"""A running OpenAI-compatible server under load."""

from __future__ import annotations

from .run import measure_endpoint
from .types import Endpoint, Level

__all__ = ["Endpoint", "Level", "measure_endpoint"]
