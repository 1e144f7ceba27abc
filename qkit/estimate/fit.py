"""Whether a model fits on devices, what is left, the longest context and the largest batch: for all devices at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import QkitError
from ..hardware.device import Target
from ..models.architecture import Architecture
from .memory import Memory, Sizes, default_kv_dtype, sizes
from .parts import Weights
from .serving import Serving, problem, usable

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 131072)
BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_TOKENS = 1 << 20  # where a config does not say what the model takes
_MOST_SEQUENCES = 1 << 16


@dataclass(frozen=True)
class Fit:
    """An answer for one target.

    memory   of each device, at `context` and `batch`; usable: what the engine may use of it, None where it is not known
    problem  why the engine does not run there at all; ""
    most     tokens that the model takes
    """

    target: Target
    engine: str
    context: int
    batch: int
    memory: Memory
    usable: int | None
    usable_words: str
    problem: str
    most: int
    sizes: Sizes = field(repr=False, compare=False)
    serving: Serving = field(repr=False, compare=False)

    @property
    def fits(self) -> bool | None:
        """None where nobody knows the device's memory."""
        if self.problem:
            return False
        return None if self.usable is None else self.memory.total <= self.usable

    @property
    def spare(self) -> int | None:
        """Bytes left on each device; negative: missing."""
        return None if self.usable is None else self.usable - self.memory.total

    def fits_at(self, context: int, batch: int) -> bool:
        if self.problem or self.usable is None or context > self.most:
            return False
        return self.needs(context, batch) <= self.usable

    def needs(self, context: int, batch: int) -> int:
        """Bytes on each device."""
        return self.sizes.total(self.target, context, batch, self.serving)

    def largest_context(self, batch: int = 1) -> int | None:
        """Tokens of each of `batch` sequences, at most what the model takes; None where not one token fits."""
        return largest(lambda n: self.fits_at(n, batch), self.most)

    def largest_batch(self, context: int) -> int | None:
        """Sequences of `context` tokens each: of an engine with pages, requests that run at once at their full length.
        None where not one fits."""
        return largest(lambda n: self.fits_at(context, n), _MOST_SEQUENCES)

    def grid(
        self, contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES
    ) -> tuple[tuple[bool, ...], ...]:
        """Whether it fits, for each context a row with a column for each batch."""
        return tuple(tuple(self.fits_at(context, batch) for batch in batches) for context in contexts)


def contexts(fit: Fit) -> list[int]:
    """Those of `CONTEXTS` that the model takes."""
    return [n for n in CONTEXTS if n <= fit.most] or [fit.most]


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest n in [1, most] that fits, where every smaller one does too; None where 1 does not."""
    if not fits(1):
        return None
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit(
    arch: Architecture,
    weights: Weights,
    target: Target,
    engine: str,
    context: int,
    batch: int = 1,
    kv_dtype: str | None = None,
    serving: Serving | None = None,
) -> Fit:
    """One target. See `fit_all`."""
    return fit_all(arch, weights, (target,), engine, context, batch, kv_dtype, serving)[0]


def fit_all(
    arch: Architecture,
    weights: Weights,
    targets: Sequence[Target],
    engine: str,
    context: int,
    batch: int = 1,
    kv_dtype: str | None = None,
    serving: Serving | None = None,
) -> tuple[Fit, ...]:
    """Whether `batch` sequences of `context` tokens fit in `engine`, for each target. kv_dtype: None: 16 bits.

    What depends on the number of devices alone is computed once, so that a catalogue takes milliseconds.
    Raises QkitError for numbers below 1 and a context that the model does not take."""
    most = arch.max_tokens or _MOST_TOKENS
    if min(context, batch) < 1:
        raise QkitError(f"context and batch are 1 or more, not {context} and {batch}")
    if context > most:
        raise QkitError(f"a context of {context:,} tokens is longer than the {most:,} that the model takes")
    s = serving or Serving()
    heads = max((layer.attention_heads for layer in arch.layers), default=0)
    known: dict[object, Sizes] = {}
    found = []
    for target in targets:
        key = sizes_key(target, engine, s)
        if key not in known:
            known[key] = sizes(arch, weights, target, engine, kv_dtype or default_kv_dtype(engine), s)
        room, words = usable(target, engine, s)
        found.append(
            Fit(
                target, engine, context, batch, known[key].memory(target, context, batch, s), room, words,
                problem(target, engine, heads), most, known[key], s,
            )
        )  # fmt: skip
    return tuple(found)


def sizes_key(target: Target, engine: str, serving: Serving) -> object:
    """Targets for which `sizes` is the same."""
    from .overhead import step

    in_flight = step(target, _MOST_TOKENS, 1, serving)[0] if engine == "vllm" else 0
    return target.count, target.device.kind == "gpu", in_flight
