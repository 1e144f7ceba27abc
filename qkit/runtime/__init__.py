"""Running converted models: packed linears inside transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..text.tokenizer import load_tokenizer
from .load import load

if TYPE_CHECKING:
    from .linear import QuantLinear

__all__ = ["QuantLinear", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """QuantLinear subclasses a torch module: imported when first asked for."""
    if name == "QuantLinear":
        from .linear import QuantLinear

        return QuantLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
