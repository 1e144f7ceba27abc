"""What a user asks for and what a file holds, in words: no torch, no I/O."""

from __future__ import annotations

from .layer import CHANNEL, Activations, Grid, LayerSpec, Scale, fp8, ggml, integer, llm_int8, mxfp4, nvfp4, table, w8a8
from .presets import AUTO_GROUP_SIZES, PRESETS, preset
from .recipe import Keep, Recipe, Rule

__all__ = [
    "AUTO_GROUP_SIZES",
    "CHANNEL",
    "PRESETS",
    "Activations",
    "Grid",
    "Keep",
    "LayerSpec",
    "Recipe",
    "Rule",
    "Scale",
    "fp8",
    "ggml",
    "integer",
    "llm_int8",
    "mxfp4",
    "nvfp4",
    "preset",
    "table",
    "w8a8",
]
