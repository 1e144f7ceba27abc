"""Which of several models are worth having: no other is as small, as close to the baseline and as fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME_RATE = 0.03  # tokens/s of one model measured twice in a row on an idle machine differ by up to this share


@dataclass(frozen=True)
class Point:
    """nbytes on disk; kld: mean KL divergence; tps: tokens/s, None where it was not timed."""

    nbytes: int
    kld: float
    tps: float | None


def on_frontier(points: Sequence[Point]) -> list[bool]:
    """For each point, whether none of the others beats it.

    One beats another that is nowhere better, and somewhere worse: in bytes, in KL divergence, and in tokens/s where
    both have them and they differ by more than SAME_RATE."""
    return [not any(_beats(other, each) for other in points) for each in points]


def _beats(a: Point, b: Point) -> bool:
    faster = slower = False
    if a.tps is not None and b.tps is not None:
        faster, slower = a.tps > b.tps * (1 + SAME_RATE), b.tps > a.tps * (1 + SAME_RATE)
    if a.nbytes > b.nbytes or a.kld > b.kld or slower:
        return False
    return a.nbytes < b.nbytes or a.kld < b.kld or faster
