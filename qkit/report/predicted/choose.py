"""Which devices and which steps a prediction speaks of: the best of each kind, and those that are of use."""

from __future__ import annotations

from collections.abc import Sequence

from ...estimate.answer import Answer, First
from ...estimate.estimate import Estimate
from ...estimate.steps import Step

MOST = 30  # devices that are shown; the rest is folded
_USEFUL, _SAVES = 7, 0.95  # steps that are shown; the share of the bytes that one may keep


def at_context(a: Answer) -> First | None:
    """The time to the first token of a prompt as long as the context asked for."""
    found = a.speeds.first if a.speeds else ()
    return next((f for f in found if f.prompt == a.fit.context), found[-1] if found else None)


def fits(result: Estimate) -> list[Answer]:
    return [a for a in result.answers if a.fit.fits]


def known(result: Estimate) -> list[Answer]:
    """Those of which it is known whether it fits: the memory of a CPU's machine is its owner's choice."""
    return [a for a in result.answers if a.fit.fits is not None]


def nearest(result: Estimate) -> Answer | None:
    """Of those on which it does not fit, the one that lacks least."""
    short = [a for a in result.answers if a.fit.spare is not None and not a.fit.problem]
    return max(short, key=lambda a: a.fit.spare or 0) if short else None


def smallest(answers: Sequence[Answer]) -> Answer:
    return min(answers, key=lambda a: ((a.fit.usable or 0) * a.target.count, a.target.spec))


def decode_rate(a: Answer) -> float:
    return a.speeds.decode.tokens_per_s if a.speeds else 0.0


def per_million(a: Answer) -> float:
    return a.costs.per_million_out if a.costs else float("inf")


def useful(result: Estimate, index: int) -> list[Step]:
    """Of the steps down on a device at most seven, by their bytes: each size once, those that fit, and of the others
    the nearest. A smaller format that saves next to nothing is none."""
    seen: dict[tuple[int, str | None], Step] = {}
    for step in result.steps[index] if result.steps else ():
        if step.kv_dtype or step.nbytes < _SAVES * result.subject.weights.total:
            seen.setdefault((step.nbytes, step.kv_dtype), step)
    each = sorted(seen.values(), key=lambda step: -step.nbytes)
    kept = [step for step in each if step.fit.fits][:_USEFUL]
    short = [step for step in each if not step.fit.fits]
    kept += sorted(short, key=lambda step: step.fit.memory.total)[: _USEFUL - len(kept)]
    return sorted(kept, key=lambda step: (-step.nbytes, step.kv_dtype or ""))


def ordered(result: Estimate) -> list[Answer]:
    """Devices as they are listed: those that fit, the fastest first; then the unknown; then those that nearly fit."""

    def key(a: Answer) -> tuple[int, float]:
        if a.fit.fits:
            return 0, -decode_rate(a)
        if a.fit.problem:
            return 3, 0.0
        return (1, 0.0) if a.fit.fits is None else (2, -(a.fit.spare or 0))

    return sorted(result.answers, key=key)


def relevant(result: Estimate, most: int = MOST) -> list[Answer]:
    """The devices that answer what people ask: of those that fit the fastest, the cheapest by the token and by the
    hour, the smallest; and those that nearly fit. In the order of `ordered`."""
    each = ordered(result)
    if len(each) <= most:
        return each
    fitting = [a for a in each if a.fit.fits]
    priced = [a for a in fitting if a.costs]
    near = [a for a in each if a.fit.fits is False and not a.fit.problem][: most // 6]
    lists = (
        fitting,
        sorted(priced, key=per_million),
        sorted(priced, key=lambda a: a.costs.usd_per_hour if a.costs else 0.0),
        sorted(fitting, key=lambda a: ((a.fit.usable or 0) * a.target.count, -decode_rate(a))),
    )
    chosen = {id(a) for a in near}
    for rank in range(len(fitting)):
        for ranked in lists:
            if rank < len(ranked) and len(chosen) < most:
                chosen.add(id(ranked[rank]))
    return [a for a in each if id(a) in chosen]
