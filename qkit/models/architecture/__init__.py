"""A model's architecture from its config.json alone: `architecture(config) -> Architecture`."""

from .build import architecture
from .types import FAMILY, USUAL, Architecture, Cache, Layer, Matrix

__all__ = ["FAMILY", "USUAL", "Architecture", "Cache", "Layer", "Matrix", "architecture"]
