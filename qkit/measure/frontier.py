"""Which of several models are worth having: no other is as small, as close to the baseline and as fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME_RATE = 0.03  # tokens/s of one model measured twice in a row on an idle machine differ by up to this share


@dataclass(frozen=True)
class Point:
    """nbytes on disk; kld: mean KL divergence; rate: tokens/s, or times the baseline's; None where it was not timed."""

    nbytes: int
    kld: float
    rate: float | None


def on_frontier(points: Sequence[Point]) -> list[bool]:
    """For each point, whether none of the others beats it.

    One beats another that is nowhere better, and somewhere worse: in bytes, in KL divergence, and in rate where
    both have one and they differ by more than SAME_RATE."""
    return [not any(_beats(other, each) for other in points) for each in points]


def _beats(a: Point, b: Point) -> bool:
    faster = slower = False
    if a.rate is not None and b.rate is not None:
        faster, slower = a.rate > b.rate * (1 + SAME_RATE), b.rate > a.rate * (1 + SAME_RATE)
    if a.nbytes > b.nbytes or a.kld > b.kld or slower:
        return False
    return a.nbytes < b.nbytes or a.kld < b.kld or faster
