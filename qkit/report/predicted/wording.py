"""What a prediction says in words: the sentence on top, the cards, and how its figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import units
from ...estimate.answer import Answer, First
from ...estimate.estimate import Estimate
from ...estimate.result import Predicted
from ...estimate.speed import Prediction
from ...estimate.steps import Step
from ...estimate.subject import Subject
from ...hardware.device import Target
from ...spec.dtypes import ITEMSIZE

_ENGINES = {"vllm": "vLLM", "transformers": "Transformers"}
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 6: "six", 8: "eight"}


def name(subject: Subject) -> str:
    """The folder's or file's own name; of a config.json its folder's."""
    path = Path(subject.label.rstrip("/"))
    path = path.parent if path.name == "config.json" and path.parent.name else path
    return path.name or subject.label


def title(result: Predicted) -> str:
    names = [name(each.subject) for each in result.estimates]
    return names[0] if len(names) == 1 else f"{len(names)} models: {', '.join(names)}"


def bits(subject: Subject) -> str:
    """ "4 bits"; of what is not quantized, its type's."""
    if subject.spec is not None:
        return f"{subject.spec.bits:.3g} bits"
    return f"{8 * ITEMSIZE.get(subject.dtype.upper(), 2):g} bits"


def engine(name: str) -> str:
    return _ENGINES.get(name, name)


def device(target: Target, count: bool = True) -> str:
    """ "one NVIDIA H100 SXM5 80GB"."""
    many = _COUNTS.get(target.count, str(target.count))
    return f"{many} {target.device.name}" if count else target.device.name


def rate(p: Prediction) -> str:
    """ "47 tokens/s (34 to 64)": with the interval that holds nine in ten."""
    return f"{number(p.tokens_per_s)} tokens/s ({number(p.low)} to {number(p.high)})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def interval(f: First) -> str:
    return f"{seconds(f.low)} to {seconds(f.high)}"


def tokens(n: int | None) -> str:
    return "none" if n is None else f"{n:,}"


def dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"


def market(source: str) -> str:
    """Of a price's source the market and the date; the rest stands in JSON and HTML."""
    return source.partition(" (")[0]


def at_context(a: Answer) -> First | None:
    """The time to the first token of a prompt as long as the context asked for."""
    found = a.speeds.first if a.speeds else ()
    return next((f for f in found if f.prompt == a.fit.context), found[-1] if found else None)


def verdict(result: Estimate) -> str:
    """What a person wants to know first, in a few sentences."""
    if len(result.answers) == 1:
        return of_one(result, 0)
    return of_many(result)


def of_one(result: Estimate, index: int) -> str:
    a, s = result.answers[index], result.subject
    fit, what = a.fit, f"{name(s)} at {bits(s)}"
    where = device(a.target)
    if fit.problem:
        return f"{what} does not run on {where} in {engine(a.engine)}: {fit.problem}."
    need = f"{units.size(fit.memory.total)}{' on each' if a.target.count > 1 else ''}"
    if fit.usable is None:
        return f"Whether {what} fits {where} is unknown: it takes {need}, and nobody knows the memory there. {_pace(result, a)}"
    if not fit.fits:
        said = f"{what} does not fit {where}: {fit.context:,} tokens of context take {need}, {units.size(-(fit.spare or 0))} more "
        said += f"than the {units.size(fit.usable)} that {engine(a.engine)} can use."
        return f"{said} {_way_out(result, index)}".strip()
    context = fit.largest_context(fit.batch) or 0
    each = f" in each of {fit.batch} sequences" if fit.batch > 1 else ""
    room = f"its full {context:,}" if context == fit.most else f"up to {context:,}"
    return f"{what} fits {where} in {engine(a.engine)}, with {room} tokens of context{each}. {_pace(result, a)} {_bill(a)}".strip()


def _pace(result: Estimate, a: Answer) -> str:
    if a.speeds is None:
        return f"Its speed is unknown: {a.unknown}."
    first = at_context(a)
    wait = f", and {seconds(first.seconds)} ({interval(first)}) until the first token of a prompt of {first.prompt:,}" if first else ""
    whom = "for one user" if result.asked.batch == 1 else f"for {result.asked.batch} users together"
    return f"Expect about {rate(a.speeds.decode)} {whom}{wait}; nine in ten lie within the parentheses."


def _bill(a: Answer) -> str:
    if a.costs is None:
        return ""
    said = f"At {dollars(a.costs.usd_per_hour)} an hour, busy {a.costs.utilization:.0%} of it, a million new tokens cost {dollars(a.costs.per_million_out)}"
    if a.against is None:
        return f"{said}."
    if a.against.first is None:
        return f"{said}; a hosted model is cheaper at any volume."
    return f"{said}; it beats the hosted price from {a.against.first:,.0f} million tokens a month ({dollars(a.against.first_bill or 0)})."


def _way_out(result: Estimate, index: int) -> str:
    """The first of the steps down that fits, or what would have to be smaller."""
    fit = result.answers[index].fit
    fitting = [step for step in useful(result.steps[index]) if step.fit.fits] if result.steps else []
    if fitting:
        step = fitting[0]
        return f"As {step.name} ({units.size(step.nbytes)}) it would, with up to {step.largest_context or 0:,} tokens."
    context = fit.largest_context(fit.batch)
    return f"Up to {context:,} tokens of context would." if context else "No context at all would."


def of_many(result: Estimate) -> str:
    what = f"{name(result.subject)} at {bits(result.subject)}"
    fitting, known = fits(result), _known(result)
    if not fitting:
        return f"{what} fits none of {len(known)} devices with {result.context:,} tokens of context."
    said = f"{what} fits {len(fitting)} of {len(known)} devices with {result.context:,} tokens of context"
    if len(fitting) == 1:
        return f"{said}. {of_one(result, result.answers.index(fitting[0]))}"
    least = smallest(fitting)
    parts = [f"the smallest is {least.target.spec} ({units.size(least.fit.usable or 0)} usable{'' if least.target.count == 1 else ' each'})"]
    timed = [a for a in fitting if a.speeds]
    if timed:
        best = max(timed, key=decode_rate)
        assert best.speeds is not None
        parts.append(f"the fastest {best.target.spec} at about {rate(best.speeds.decode)}")
    priced = [a for a in fitting if a.costs]
    if priced:
        cheap = min(priced, key=per_million)
        parts.append(f"the cheapest by the token {cheap.target.spec} at {dollars(per_million(cheap))} a million new ones")
    return f"{said}: {', '.join(parts)}. Nine in ten lie within the parentheses."


def fits(result: Estimate) -> list[Answer]:
    return [a for a in result.answers if a.fit.fits]


def _known(result: Estimate) -> list[Answer]:
    """Those of which it is known whether it fits: the memory of a CPU's machine is its owner's choice."""
    return [a for a in result.answers if a.fit.fits is not None]


def smallest(answers: Sequence[Answer]) -> Answer:
    return min(answers, key=lambda a: ((a.fit.usable or 0) * a.target.count, a.target.spec))


def decode_rate(a: Answer) -> float:
    return a.speeds.decode.tokens_per_s if a.speeds else 0.0


def per_million(a: Answer) -> float:
    return a.costs.per_million_out if a.costs else float("inf")


def cards(result: Estimate) -> list[dict[str, str]]:
    """The figures on top: title, value, and what it is held against."""
    return _cards_of_one(result) if len(result.answers) == 1 else _cards_of_many(result)


def _card(title: str, value: str, note: str) -> dict[str, str]:
    return {"title": title, "value": value, "note": note}


def _cards_of_one(result: Estimate) -> list[dict[str, str]]:
    a = result.answers[0]
    fit, s, first = a.fit, a.speeds, at_context(a)
    known = {True: "fits", False: "does not fit", None: "unknown"}[fit.fits]
    each = " on each," if a.target.count > 1 else ""
    of = f"of {units.size(fit.usable)} usable" if fit.usable is not None else "; what is usable is not known"
    found = [_card("Memory", known, fit.problem or f"{units.size(fit.memory.total)}{each} {of}")]
    context, batch = fit.largest_context(fit.batch), fit.largest_batch(fit.context)
    many = f"{batch:,} sequences of {fit.context:,} at once" if batch else f"not even {fit.context:,} tokens"
    found.append(_card("Largest context", tokens(context), f"tokens at batch {fit.batch}; {many}"))
    if s is None:
        return [*found, _card("Decode", "unknown", a.unknown), _card("First token", "unknown", a.unknown), _cost_card(a)]
    more = f"; {number(s.loaded.tokens_per_s)} over {s.loaded.sequences:,.0f}" if s.loaded.sequences > fit.batch else ""
    note = f"{number(s.decode.low)} to {number(s.decode.high)}, at batch {fit.batch}{more}"
    found.append(_card("Decode", f"{number(s.decode.tokens_per_s)} tok/s", note))
    instant = f"; within 0.1 s up to {s.instant:,}" if s.instant else ""
    wait = f"{interval(first)}, after a prompt of {first.prompt:,}{instant}" if first else ""
    found.append(_card("First token", seconds(first.seconds) if first else "unknown", wait))
    return [*found, _cost_card(a)]


def _cost_card(a: Answer) -> dict[str, str]:
    c = a.costs
    if c is None:
        why = "it does not run there" if a.fit.fits is False else "no price, or no speed, is known"
        return _card("A million new tokens", "unknown", why)
    note = f"{dollars(c.per_million_in)} of prompts; {dollars(c.usd_per_hour)}/h ({market(c.source)}), busy {c.utilization:.0%}"
    return _card("A million new tokens", dollars(c.per_million_out), note)


def _cards_of_many(result: Estimate) -> list[dict[str, str]]:
    """The extremes, each with whose it is."""
    fitting, known = fits(result), _known(result)
    if not fitting:
        short = sorted((a for a in result.answers if a.fit.spare is not None and not a.fit.problem), key=lambda a: -(a.fit.spare or 0))
        nearest = f"nearest: {short[0].target.spec}, {units.size(-(short[0].fit.spare or 0))} short" if short else "nothing is near"
        return [_card("Fits", f"none of {len(known)}", nearest)]
    least = smallest(fitting)
    found = [_card("Fits", f"{len(fitting)} of {len(known)}", f"smallest: {least.target.spec}")]
    longest = max(fitting, key=lambda a: (a.fit.largest_context(a.fit.batch) or 0, -(a.fit.usable or 0)))
    context = longest.fit.largest_context(longest.fit.batch)
    own = ", the model's own maximum" if context == longest.fit.most else ""
    found.append(_card("Largest context", tokens(context), f"{longest.target.spec}{own}"))
    timed = [a for a in fitting if a.speeds]
    if timed:
        best = max(timed, key=decode_rate)
        assert best.speeds is not None
        p = best.speeds.decode
        found.append(_card("Fastest decode", f"{number(p.tokens_per_s)} tok/s", f"{best.target.spec}, {number(p.low)} to {number(p.high)}"))
        quick = min(((f, a) for a in timed if (f := at_context(a))), key=lambda each: each[0].seconds)
        note = f"{quick[1].target.spec}, {interval(quick[0])}, after {quick[0].prompt:,} tokens"
        found.append(_card("Quickest first token", seconds(quick[0].seconds), note))
    priced = [a for a in fitting if a.costs]
    if priced:
        cheap = min(priced, key=per_million)
        assert cheap.costs is not None
        note = f"{cheap.target.spec}, {dollars(cheap.costs.usd_per_hour)}/h ({market(cheap.costs.source)})"
        found.append(_card("Cheapest million new tokens", dollars(cheap.costs.per_million_out), note))
    return found


_USEFUL = 7


def useful(steps: Sequence[Step]) -> list[Step]:
    """At most seven steps, by their bytes: each size once, those that fit first, and of what does not fit the nearest."""
    seen: dict[tuple[int, str | None], Step] = {}
    for step in steps:
        seen.setdefault((step.nbytes, step.kv_dtype), step)
    each = sorted(seen.values(), key=lambda step: -step.nbytes)
    fitting = [step for step in each if step.fit.fits]
    short = [step for step in each if not step.fit.fits]
    kept = fitting[:_USEFUL]
    kept += sorted(short, key=lambda step: step.fit.memory.total)[: max(1, _USEFUL - len(kept)) if len(kept) < _USEFUL else 0]
    return sorted(kept, key=lambda step: (-step.nbytes, step.kv_dtype or ""))


def thresholds(result: Predicted) -> str:
    """Whether thresholds were met; nothing where there are none."""
    if result.failures:
        return "Threshold missed: " + "; ".join(result.failures)
    return "Thresholds met: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in result.thresholds.items()) if result.thresholds else ""
