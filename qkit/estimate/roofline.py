"""Seconds of a step, by the roofline of a device: bytes over bandwidth, operations over peak, a launch a layer.

Williams et al., "Roofline" (2009), for the two ceilings; Pope et al., "Efficiently Scaling Transformer Inference"
(2022), for what a decoder moves and multiplies. What an engine reaches of the ceilings is fitted: `rates.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .traffic import Traffic

_SHARP = 3.0  # the two ceilings meet in a curve: (a^3 + b^3)^(1/3)
# Norms, rotations, activations and copies, in operations for each value of the stream and layer, at attention's rate:
# what halves the error of small models' prompts on CPUs (profiles/local-speed.csv) and moves GPUs' by nothing.
_BETWEEN = 1000.0
_UBATCH = 512  # tokens that llama.cpp takes of a prompt at once


@dataclass(frozen=True)
class Ceilings:
    """What a device could do. bandwidth: bytes/s, peak: operations/s of the type that the kernel multiplies in, plain:
    the same in 16 bits; count: devices."""

    bandwidth: float
    peak: float
    plain: float
    count: int = 1


@dataclass(frozen=True)
class Manner:
    """How an engine goes about a step.

    overlaps   the host prepares kernels while others run: the longer of both counts, not their sum
    chunked    a prompt goes through in pieces of 512 tokens
    serial     several devices hold layers, one after the other; else they share each matrix
    repeats    keys and values are written out once a query head before they are multiplied
    expands    4-bit weights are written out in 16 bits for more than one row
    """

    overlaps: bool = False
    chunked: bool = False
    serial: bool = False
    repeats: bool = False
    expands: bool = False


@dataclass(frozen=True)
class Rates:
    """What an engine reaches there.

    launch       s a layer and pass
    bandwidth, compute  share of the ceilings; attention: of compute, in attention over a prompt and between matrices
    cache        bytes moved for each byte of cache that is looked at
    sequence     s a sequence and step: sampling, scheduling, moving what it keeps
    link         s a layer and pass where devices share matrices
    pipeline     by how much devices in series speed a long prompt up, at most
    concurrency  sequences that run of those that would fit in memory
    """

    launch: float
    bandwidth: float
    compute: float
    attention: float
    cache: float
    sequence: float
    link: float
    pipeline: float
    concurrency: float


def decode(work: Traffic, has: Ceilings, how: Manner, rates: Rates, sequences: float, context: float) -> float:
    """Seconds of one step that gives each of `sequences` sequences of `context` tokens one more."""
    return _step(work, has, how, rates, sequences, context, sequences)


def micro_batch(work: Traffic, has: Ceilings, how: Manner, rates: Rates, tokens: float, context: float) -> float:
    """Seconds of a pass over `tokens` tokens of one sequence that look at `context` tokens."""
    count = 1 if how.serial else has.count
    attention = work.attention(tokens, context) / (has.plain * count * rates.compute * rates.attention)
    return _step(work, has, how, rates, tokens, context, 1.0) + attention


def _step(
    work: Traffic, has: Ceilings, how: Manner, rates: Rates, tokens: float, context: float, sequences: float
) -> float:
    count = 1 if how.serial else has.count
    bandwidth = has.bandwidth * rates.bandwidth * count
    read = _read(work, how, tokens) + work.head_bytes
    operations = 2 * tokens * (work.values + work.head_values)
    cache = sequences * work.cache_bytes(context) * rates.cache * (work.groups if how.repeats else 1.0)
    # 0.8: what a plain read reaches anywhere; how well weights are read says nothing about the cache.
    busy = _both(read / bandwidth, operations / (has.peak * rates.compute * count)) + cache / (
        has.bandwidth * 0.8 * count
    )
    seconds = _with_launches(busy, work.layers * rates.launch, how) + sequences * rates.sequence
    return seconds + _link(work, has, how, rates, 1)


def prefill(work: Traffic, has: Ceilings, how: Manner, rates: Rates, sequences: float, prompt: float) -> float:
    """Seconds until `sequences` prompts of `prompt` tokens have gone through."""
    count = 1 if how.serial else has.count
    tokens = sequences * prompt
    passes = math.ceil(tokens / _UBATCH) if how.chunked else 1
    reading = passes * _read(work, how, tokens / passes) / (has.bandwidth * rates.bandwidth * count)
    computing = 2 * tokens * work.values / (has.peak * rates.compute * count)
    between = tokens * work.layers * work.hidden * _BETWEEN
    attention = (work.attention(tokens, prompt / 2) + between) / (has.plain * count * rates.compute * rates.attention)
    # Logits are of the last position alone: what counts is that the head's weights are read.
    head = work.head_bytes / (has.bandwidth * rates.bandwidth * count)
    seconds = _with_launches(_both(reading, computing) + attention + head, passes * work.layers * rates.launch, how)
    if how.serial and has.count > 1:
        stages = passes * has.count / (passes + has.count - 1)
        seconds /= min(stages, max(1.0, rates.pipeline))
    return seconds + _link(work, has, how, rates, passes)


def _read(work: Traffic, how: Manner, tokens: float) -> float:
    """Bytes of weights that a pass moves: expanded ones are written and read again at 16 bits."""
    extra = 4.0 * (work.dense_values + work.expert_values * work.hit(tokens)) if how.expands and tokens > 1 else 0.0
    return work.weight_bytes(tokens) + extra


def _link(work: Traffic, has: Ceilings, how: Manner, rates: Rates, passes: int) -> float:
    return passes * work.layers * rates.link if has.count > 1 and not how.serial else 0.0


def _with_launches(busy: float, launches: float, how: Manner) -> float:
    return _both(busy, launches) if how.overlaps else busy + launches


def _both(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high * (1.0 + (low / high) ** _SHARP) ** (1 / _SHARP) if high else 0.0
