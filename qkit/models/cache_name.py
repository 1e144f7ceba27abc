"""What transformers calls the KV cache: `past_key_values`, from 5.24 on `cache` (where the old name is deprecated)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import signature
from typing import Any

NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """The installed transformers' own name: of the argument, and of the field of an output."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return NAMES[0] if any(field.name == NAMES[0] for field in fields(CausalLMOutputWithPast)) else NAMES[1]


def name_in(given: Iterable[str], forward: Callable[..., Any]) -> str:
    """The name under which `given` holds the cache, else the one that `forward` takes: callers may still use the old
    name, and models of a Hub repository's own code do."""
    taken = next((name for name in NAMES if name in given), None)
    return taken or next((name for name in NAMES if name in signature(forward).parameters), cache_name())
