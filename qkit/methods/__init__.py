"""Quantization methods, in the order users see them."""

from __future__ import annotations

from ..errors import QkitError
from .base import Cost, Method, Quantized
from .gptq import Gptq
from .imatrix import Imatrix
from .rtn import Rtn

__all__ = ["METHODS", "Cost", "Method", "Quantized", "get"]

METHODS: dict[str, Method] = {"rtn": Rtn(), "gptq": Gptq(), "imatrix": Imatrix()}


def get(name: str) -> Method:
    """The method a user named. Raises QkitError listing the known ones."""
    key = name.lower()
    if key not in METHODS:
        raise QkitError(f"unknown method {name!r}", "known methods: " + ", ".join(METHODS))
    return METHODS[key]
