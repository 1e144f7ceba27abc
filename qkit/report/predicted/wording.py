"""What a prediction says in words: names, the sentence on top, thresholds."""

from __future__ import annotations

from pathlib import Path

from ... import units
from ...estimate.answer import Answer
from ...estimate.estimate import Estimate
from ...estimate.result import Predicted
from ...estimate.subject import Subject
from ...hardware.device import Target
from ...spec.dtypes import ITEMSIZE
from ..layout import thresholds_met
from .choose import at_context, decode_rate, fits, known, nearest, per_million, smallest, useful
from .shown import dollars, interval, rate, seconds

_ENGINES = {"vllm": "vLLM", "transformers": "Transformers"}
_NAMED = 4  # thresholds that are missed; on a whole catalogue there are many
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


def device(target: Target) -> str:
    """ "one NVIDIA H100 SXM5 80GB"."""
    return f"{_COUNTS.get(target.count, str(target.count))} {target.device.name}"


def verdict(result: Estimate) -> str:
    """What a person wants to know first, in a few sentences."""
    return of_one(result, 0) if len(result.answers) == 1 else _of_many(result)


def of_one(result: Estimate, index: int) -> str:
    """The same of one of several devices."""
    a = result.answers[index]
    fit, what, where = a.fit, _what(result), device(a.target)
    if fit.problem:
        return f"{what} does not run on {where} in {engine(a.engine)}: {fit.problem}."
    need = f"{units.size(fit.memory.total)}{' on each' if a.target.count > 1 else ''}"
    if fit.usable is None:
        unknown = f"Whether {what} fits {where} is unknown: it takes {need}, and nobody knows the memory there."
        return f"{unknown} {_pace(result, a)}"
    if not fit.fits:
        missing = units.size(-(fit.spare or 0))
        said = f"{what} does not fit {where}: {fit.context:,} tokens of context take {need}, {missing} more than the "
        return f"{said}{units.size(fit.usable)} that {engine(a.engine)} can use. {_way_out(result, index)}"
    context = fit.largest_context(fit.batch) or 0
    room = f"{'its full' if context == fit.most else 'up to'} {context:,} tokens of context"
    room += f" in each of {fit.batch} sequences" if fit.batch > 1 else ""
    return f"{what} fits {where} in {engine(a.engine)}, with {room}. {_pace(result, a)} {_bill(a)}".strip()


def _what(result: Estimate) -> str:
    return f"{name(result.subject)} at {bits(result.subject)}"


def _pace(result: Estimate, a: Answer) -> str:
    if a.speeds is None:
        return f"Its speed is unknown: {a.unknown}."
    whom = "for one user" if result.asked.batch == 1 else f"for {result.asked.batch} users together"
    said = f"Expect about {rate(a.speeds.decode)} {whom}"
    if first := at_context(a):
        wait = f"{seconds(first.seconds)} ({interval(first)})"
        said += f", and {wait} until the first token of a prompt of {first.prompt:,}"
    return f"{said}; nine in ten lie within the parentheses."


def _bill(a: Answer) -> str:
    c, v = a.costs, a.against
    if c is None:
        return ""
    said = f"At {dollars(c.usd_per_hour)} an hour, busy {c.utilization:.0%} of it, "
    said += f"a million new tokens cost {dollars(c.per_million_out)}"
    if v is None:
        return f"{said}."
    if v.first is None:
        return f"{said}; a hosted model is cheaper at any volume."
    return (
        f"{said}; it beats the hosted price from {v.first:,.0f} million tokens a month ({dollars(v.first_bill or 0)})."
    )


def _way_out(result: Estimate, index: int) -> str:
    """The first of the steps down that fits, or what would have to be smaller."""
    fit = result.answers[index].fit
    fitting = [step for step in useful(result, index) if step.fit.fits]
    if fitting:
        step = fitting[0]
        return f"As {step.name} ({units.size(step.nbytes)}) it would, with up to {step.largest_context or 0:,} tokens."
    context = fit.largest_context(fit.batch)
    return f"Up to {context:,} tokens of context would." if context else "No context at all would."


def _of_many(result: Estimate) -> str:
    fitting, of, at = fits(result), len(known(result)), f"with {result.context:,} tokens of context"
    if not fitting:
        near = nearest(result)
        lacks = f" The nearest is {near.target.spec}, which lacks {units.size(-(near.fit.spare or 0))}." if near else ""
        return f"{_what(result)} fits none of {of} devices {at}.{lacks}"
    said = f"{_what(result)} fits {len(fitting)} of {of} devices {at}"
    if len(fitting) == 1:
        return f"{said}. {of_one(result, result.answers.index(fitting[0]))}"
    least = smallest(fitting)
    each = " each" if least.target.count > 1 else ""
    parts = [f"the smallest is {least.target.spec} ({units.size(least.fit.usable or 0)} usable{each})"]
    best, cheap = max(fitting, key=decode_rate), min(fitting, key=per_million)
    if best.speeds:
        parts.append(f"the fastest {best.target.spec} at about {rate(best.speeds.decode)}")
    if cheap.costs:
        price = dollars(cheap.costs.per_million_out)
        parts.append(f"the cheapest by the token {cheap.target.spec} at {price} a million new ones")
    return f"{said}: {', '.join(parts)}." + (" Nine in ten lie within the parentheses." if best.speeds else "")


def thresholds(result: Predicted) -> str:
    """Whether thresholds were met; nothing where there are none."""
    if result.failures:
        more = len(result.failures) - _NAMED
        rest = f"; and {more} more, which profile.json names" if more > 0 else ""
        return "Threshold missed: " + "; ".join(result.failures[:_NAMED]) + rest
    return thresholds_met(result.thresholds)
