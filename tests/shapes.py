"""Architectures of well-known models, by their names in benchmarks/published/models.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from qkit.models.architecture import Architecture, architecture

MODELS = Path(__file__).parents[1] / "benchmarks" / "published" / "models.json"


@cache
def _configs() -> dict[str, dict[str, Any]]:
    return {name: e["config"] for e in json.loads(MODELS.read_text(encoding="utf-8")) for name in e["names"]}


@cache
def shape(name: str, tokens: int = 131072) -> Architecture:
    """tokens: that the model takes."""
    return architecture({**_configs()[name], "max_position_embeddings": tokens})
