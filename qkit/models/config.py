"""Values of a config.json as they are meant: null is the default, a number is a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import QkitError
from ..spec.dtypes import named_dtype


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the text decoder: of a multimodal model `text_config`, else the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and nested else config


def check_names(config: Mapping[str, Any]) -> None:
    """Raises QkitError where what a config calls itself is no name: names are looked up in many tables."""
    for part in (config, text_config(config)):
        kind = part.get("model_type")
        if kind is not None and not isinstance(kind, str):
            raise QkitError(f"model_type in config.json is {str(kind)[:60]}, not a name", "check its origin")
    architectures(config)


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes that a config is for; [] where it names none. Raises QkitError for what are no names."""
    named = config.get("architectures")
    if not named:
        return []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise QkitError(f"architectures in config.json is {str(named)[:60]}, not a list of names", "check its origin")
    return named


def positive_int(config: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number from 1 up; `default` where it is absent or null. Raises QkitError naming key and value."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise QkitError(f"{name} in config.json is {value!r}, not a positive whole number", "check the file's origin")
    return value


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a config says the model takes; None where it says nothing."""
    return positive_int(text_config(config), "max_position_embeddings", 0) or None


def model_dtype(config: Mapping[str, Any]) -> str:
    """The safetensors name of the float type a config declares, "BF16" where it declares none."""
    for part in (config, text_config(config)):
        declared = part.get("dtype") or part.get("torch_dtype")
        if declared:
            return named_dtype(declared) or "BF16"
    return "BF16"
