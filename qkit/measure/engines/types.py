"""What an engine's sweep holds: points over batch and context, each measured, or skipped with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One batch size at one context. Times in seconds, rates in tokens/s; None where it was not measured.

    context      tokens in each sequence before the new ones, as asked for
    prompt       tokens of each prompt: context, or less where the model takes no more than both
    generated    new tokens a sequence and run
    warmups      runs before the timed ones, of two new tokens each
    repeats      timed runs
    ttft         of each run: from the call until every sequence has its first new token
    tpot         of each decode step of all runs, in which every sequence gets one new token
    prefill_tps  batch x prompt / ttft_p50
    decode_tps   batch x steps / sum of their times
    generate     whole calls of the engine's own generate, prompt included, one a repeat; empty where it has none
    generate_tps batch x (generated - 1) a call / their time after the first new token; None where it has none
    peak_bytes   the most that the engine's processes held in RAM while the timed runs ran; on a GPU, the most that
                 torch allocated there. None where neither can be seen
    read_gbs     1e9 bytes a second that the median step reads of weights and caches, and read_share, their share of
                 what the device reads at most; None where the bytes are not known
    skipped      why nothing was measured; None where it was
    """

    batch: int
    context: int
    prompt: int
    generated: int
    warmups: int = 0
    repeats: int = 0
    ttft: tuple[float, ...] = ()
    tpot: tuple[float, ...] = ()
    ttft_p50: float | None = None
    tpot_p50: float | None = None
    tpot_p90: float | None = None
    tpot_p99: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    generate: tuple[float, ...] = ()
    generate_tps: float | None = None
    peak_bytes: int | None = None
    read_gbs: float | None = None
    read_share: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Sweep:
    """One model in one engine, in a process of their own.

    engine_version  of the package that ran it, such as "vllm 0.32.0"
    settings        what the engine was told, and what it says of itself (threads, types, kernels)
    points          in the order of batch x context; those that were not reached are skipped, with the reason
    problem         why the process ended before its last point; None where it did not
    """

    engine: str
    engine_version: str
    model: str
    settings: dict[str, Any]
    points: tuple[Point, ...]
    problem: str | None = None

    @property
    def measured(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.skipped is None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured_point(
    plan: Point,
    *,
    warmups: int,
    ttft: Sequence[float],
    tpot: Sequence[float],
    generate: Sequence[tuple[float, float]],
    peak_bytes: int | None,
) -> Point:
    """`plan` with its figures. generate: of each call, (all of its seconds, those after the first new token)."""
    from dataclasses import replace

    import numpy as np

    ttft_p50 = float(np.percentile(ttft, 50))
    p50, p90, p99 = (float(np.percentile(tpot, p)) for p in (50, 90, 99)) if tpot else (None, None, None)
    tails = sum(tail for _, tail in generate)
    new = plan.batch * len(generate) * (plan.generated - 1)
    return replace(
        plan,
        warmups=warmups,
        repeats=len(ttft),
        ttft=tuple(ttft),
        tpot=tuple(tpot),
        ttft_p50=ttft_p50,
        tpot_p50=p50,
        tpot_p90=p90,
        tpot_p99=p99,
        prefill_tps=plan.batch * plan.prompt / ttft_p50,
        decode_tps=plan.batch * len(tpot) / sum(tpot) if tpot else None,
        generate=tuple(call for call, _ in generate),
        generate_tps=new / tails if tails > 0 else None,
        peak_bytes=peak_bytes,
    )
