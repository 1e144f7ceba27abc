"""Where a load stands under a device's roofline: operations for each byte that is read, operations a second."""

from __future__ import annotations

from dataclasses import dataclass

from .roofline import Ceilings, Manner
from .speed import Prediction
from .traffic import Traffic


@dataclass(frozen=True)
class Spot:
    """One load. phase: "decode" (of `sequences`, each of `tokens` tokens) or "prefill" (of one prompt of `tokens`).

    operations_per_byte  by the model: what is multiplied and added, over weights and cache that are read
    operations_per_s     at the speed that is predicted, with its interval
    """

    phase: str
    sequences: int
    tokens: int
    operations_per_byte: float
    operations_per_s: float
    low: float
    high: float


@dataclass(frozen=True)
class Roof:
    """bandwidth: bytes/s, peak: operations/s, of all devices that compute at the same time."""

    bandwidth: float
    peak: float
    spots: tuple[Spot, ...]


def decode_work(work: Traffic, sequences: int, context: float) -> tuple[float, float]:
    """(operations, bytes) of one step that gives each sequence of `context` tokens one more."""
    operations = 2.0 * sequences * (work.values + work.head_values) + work.attention(sequences, context)
    return operations, work.weight_bytes(sequences) + work.head_bytes + sequences * work.cache_bytes(context)


def prefill_work(work: Traffic, prompt: int) -> tuple[float, float]:
    """(operations, bytes) of one pass over a prompt: each token looks at half of it, on the average."""
    return 2.0 * prompt * work.values + work.attention(prompt, prompt / 2), work.weight_bytes(prompt) + work.head_bytes


def roof(
    work: Traffic,
    has: Ceilings,
    how: Manner,
    context: int,
    batches: tuple[tuple[int, Prediction], ...],
    prompts: tuple[tuple[int, Prediction], ...],
) -> Roof:
    """batches: decode at `context` tokens; prompts: prefill of one prompt, by its tokens."""
    count = 1 if how.serial else has.count
    spots = [_spot("decode", n, context, decode_work(work, n, context), p, n) for n, p in batches]
    spots += [_spot("prefill", 1, n, prefill_work(work, n), p, n) for n, p in prompts]
    return Roof(has.bandwidth * count, has.peak * count, tuple(spots))


def _spot(phase: str, sequences: int, tokens: int, done: tuple[float, float], p: Prediction, gives: int) -> Spot:
    operations, nbytes = done
    each = operations / gives  # of a token
    return Spot(phase, sequences, tokens, operations / nbytes, each * p.tokens_per_s, each * p.low, each * p.high)
