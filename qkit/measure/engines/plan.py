"""Which points a sweep runs, and why the others are skipped: decided from headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ... import units
from .types import Point

if TYPE_CHECKING:
    from ..fit import Sizes

CONTEXTS = (2048, 8192, 32768)
GENERATED = 64


def plan(
    sizes: Sizes,
    batches: Sequence[int],
    contexts: Sequence[int] = CONTEXTS,
    *,
    free: int,
    whole: bool,
    generated: int = GENERATED,
) -> tuple[Point, ...]:
    """A point for each batch at each context, the smallest first; those that cannot run are skipped.

    free    bytes free on the device
    whole   whether a prompt goes through the model at once; else activations are the engine's, of a few tokens
    """
    pairs = {(context * batch, context, batch) for context in contexts for batch in batches}
    return tuple(_point(sizes, b, c, free, whole, generated) for _, c, b in sorted(pairs))


def _point(sizes: Sizes, batch: int, context: int, free: int, whole: bool, generated: int) -> Point:
    most = sizes.max_tokens
    prompt = context if most is None else min(context, most - generated)
    if most is not None and context > most:
        return Point(batch, context, context, generated, skipped=f"the model takes {most:,} tokens")
    if prompt < 1:
        return Point(batch, context, context, generated, skipped=f"the model takes {most:,} tokens, with what is new")
    cache = needed_cache(sizes, batch, prompt + generated)
    passing = max(sizes.head(batch), sizes.layer(prompt, batch) if whole else 0)
    needed = sizes.weights + cache + passing
    if needed > free:
        return Point(
            batch,
            context,
            prompt,
            generated,
            skipped=f"needs {units.size(needed)} by formula ({units.size(cache)} of it KV cache), "
            f"and {units.size(free)} are free",
        )
    return Point(batch, context, prompt, generated)


def needed_cache(sizes: Sizes, batch: int, tokens: int) -> int:
    """Bytes of the KV cache of `batch` sequences of `tokens` tokens."""
    return sizes.kv(tokens, batch)[0]
