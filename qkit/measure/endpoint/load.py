"""Requests at one concurrency, and the figures of those that succeeded."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .request import Outcome
from .types import Failures, Level, Spread


@dataclass(frozen=True)
class Ran:
    """Outcomes of a level. Times of time.perf_counter: began, ended, and when the first connection found no request
    left to send: until then `concurrency` of them were under way."""

    outcomes: tuple[Outcome, ...]
    began: float
    ended: float
    full_until: float


def run(
    send: Callable[[int], Outcome],
    concurrency: int,
    requests: int,
    seconds: float,
    progress: Callable[[float], None] = lambda amount: None,
) -> Ran:
    """Send `requests` requests, `concurrency` at a time, each as soon as another has ended; after `seconds` none
    but those that the level begins with.

    send(i): request number i, raising nothing. progress(1) after each."""
    outcomes: list[Outcome] = []
    lock = threading.Lock()
    began = time.perf_counter()
    left = iter(range(requests))
    full_until: list[float] = []

    def take() -> int | None:
        with lock:
            index = next(left, None)
            now = time.perf_counter()
            if index is None or (index >= concurrency and now - began > seconds):
                full_until.append(now)
                return None
            return index

    def work() -> None:
        while (index := take()) is not None:
            outcome = send(index)
            with lock:
                outcomes.append(outcome)
            progress(1)

    # Daemons: where the user interrupts, nobody waits for requests under way.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Ran(tuple(outcomes), began, max(o.ended for o in outcomes), min(full_until))


def level(ran: Ran, concurrency: int, requests: int) -> Level:
    """The figures of a level in which `requests` should have been sent."""
    good = [o for o in ran.outcomes if o.reason is None]
    seconds = ran.ended - ran.began
    tokens = sum(o.tokens for o in good)
    prompts = [o.prompt_tokens for o in good if o.prompt_tokens is not None]
    sent = len(ran.outcomes)
    problem = None
    if sent < requests:
        problem = f"{sent} of {requests} requests were sent in the time of a level"
    if not good:
        problem = f"all {sent} requests failed"
    window = ran.full_until - ran.began
    steady = sum(_until(o, ran.full_until) for o in good)
    return Level(
        concurrency=concurrency,
        requests=sent,
        succeeded=len(good),
        failed=failures(ran.outcomes),
        ended_early=sum(o.early for o in good),
        seconds=seconds,
        connect=spread([o.connected for o in good]),
        ttft=spread([o.ttft for o in good]),
        tpot=spread([t for o in good if (t := o.tpot) is not None]),
        gap=spread([b - a for o in good for a, b in zip(o.arrivals, o.arrivals[1:], strict=False)]),
        latency=spread([o.latency for o in good]),
        prompt_tokens=sum(prompts) if prompts and len(prompts) == len(good) else None,
        output_tokens=tokens,
        requests_per_s=len(good) / seconds,
        output_tps=tokens / seconds,
        steady_tps=steady / window if window > 0 and steady else None,
        problem=problem,
    )


def _until(outcome: Outcome, end: float) -> float:
    """Tokens that had come by `end`, each chunk with its share of them."""
    came = sum(at <= end for at in outcome.arrivals)
    return outcome.tokens * came / len(outcome.arrivals)


def failures(outcomes: Sequence[Outcome]) -> tuple[Failures, ...]:
    """Counted by reason, the most frequent first."""
    counts = Counter(o.reason for o in outcomes if o.reason is not None)
    first = {o.reason: o.message for o in reversed(outcomes)}
    return tuple(Failures(reason, count, first[reason]) for reason, count in counts.most_common())


def spread(values: Sequence[float]) -> Spread | None:
    import numpy as np

    if not values:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return Spread(float(np.mean(values)), p50, p90, p99)
