"""A model's architecture from its config.json alone. Needs neither torch nor transformers, nor a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import QkitError
from .build import decoder
from .encoders import ENCODERS
from .keys import Keys
from .multimodal import KINDS, multimodal
from .types import FAMILY, USUAL, Architecture, Cache, Layer, Matrix

__all__ = ["FAMILY", "USUAL", "Architecture", "Cache", "Layer", "Matrix", "architecture"]


def architecture(config: Mapping[str, Any]) -> Architecture:
    """What the model of a parsed config.json consists of.

    Raises QkitError that names the field which is missing or impossible. A family that is not known is read by the
    usual keys, and `basis` says so."""
    if not isinstance(config, Mapping):
        raise QkitError("config.json is not an object", "is this a transformers checkpoint?")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise QkitError("config.json names no model_type", "is this a transformers checkpoint?")
    k = Keys(config, kind)
    if kind in ENCODERS:
        return ENCODERS[kind](k)
    if kind in KINDS or config.get("text_config") is not None:
        return multimodal(k)
    return decoder(k)
