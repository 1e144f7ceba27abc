"""An estimate as text: the answer first, for one device in detail, for many as a table. At most 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from .. import units
from ..report.predicted import wording as w
from ..report.predicted.choose import at_context, ordered, relevant, useful
from ..report.predicted.shown import dollars, interval, market, rate, seconds
from .answer import Answer, First
from .estimate import Estimate
from .steps import Step

WIDTH = 120
_GIB = 1 << 30
_LABEL = 10  # columns of what a line is about


def describe(result: Estimate) -> str:
    lines = [*heading(result), ""]
    if result.detailed:
        for index, answer in enumerate(result.answers):
            lines += [*_detail(result, index, answer), ""]
    else:
        lines += [*_table(result), ""]
    return "\n".join([*lines, *_footing(result)]).rstrip()


def heading(result: Estimate) -> list[str]:
    s, arch = result.subject, result.subject.arch
    active = arch.active_parameters
    count = f"{arch.parameters / 1e9:.2f} B parameters"
    count += f", {active / 1e9:.1f} B of them active (mixture of experts)" if active < 0.8 * arch.parameters else ""
    basis = "" if arch.basis == "known family" else f" - {arch.basis}"
    return [
        *_said("", w.verdict(result)),
        "",
        *_said("", f"{s.label}: {arch.model_type}, {count}, {len(arch.layers)} layers"),
        *_said("", f"{s.stored}: {units.size(s.weights.total)}, {s.bits_per_weight:.2f} bits per weight{basis}"),
        f"PREDICTED for a context of {result.context:,} tokens at batch {result.asked.batch}; nothing was loaded",
    ]


def _said(label: str, words: str) -> list[str]:
    """A line about something, wrapped beside its label."""
    first, rest = (f"  {label:<{_LABEL}}", " " * (_LABEL + 2)) if label else ("", "")
    return textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=True)


def _detail(result: Estimate, index: int, a: Answer) -> list[str]:
    fit = a.fit
    verdict = {True: "FITS", False: "does NOT fit", None: "memory unknown"}[fit.fits]
    head = f"{w.device(a.target)}, {w.engine(a.engine)}: "
    if fit.problem:
        return _said("", head + fit.problem)
    each = " on each" if a.target.count > 1 else ""
    of = " needed," if fit.fits is False else " of"
    usable = f"{of} {units.size(fit.usable)} usable" if fit.usable is not None else ""
    parts = ", ".join(f"{t.name} {units.size(t.nbytes)}" for t in fit.memory.terms if t.nbytes)
    lines = [head + verdict, *_said("memory", f"{units.size(fit.memory.total)}{usable}{each}: {parts}")]
    context, batch = fit.largest_context(fit.batch), fit.largest_batch(fit.context)
    if context:
        own = ", the model's own maximum" if context == fit.most else ""
        many = f"; {batch:,} sequence{'' if batch == 1 else 's'} of {fit.context:,} at once" if batch else ""
        lines += _said("room", f"up to {context:,} tokens of context at batch {fit.batch}{own}{many}")
    lines += [*_speed(a), *_cost(a)]
    return [*lines, *_steps(useful(result, index))]


def _speed(a: Answer) -> list[str]:
    s = a.speeds
    if s is None:
        return _said("speed", f"unknown: {a.unknown}")
    more = f"; {rate(s.loaded)} over {s.loaded.sequences:,.0f} sequences" if s.loaded.sequences > a.fit.batch else ""
    firsts = ", ".join(
        f"{seconds(f.seconds)} ({interval(f)}) for {f.prompt:,} tokens" for f in _few(s.first, a.fit.context)
    )
    instant = f"; within 0.1 s up to {s.instant:,}" if s.instant else ""
    return [
        *_said("decode", f"{rate(s.decode)}, bound by {s.decode.bound}{more}"),
        *_said("prefill", rate(s.prefill)),
        *_said("first", f"token after {firsts}{instant}"),
        *_said("basis", f"{s.decode.basis}; parentheses hold nine in ten"),
        *(_said("note", a.slow) if a.slow else []),
    ]


def _few(firsts: Iterable[First], context: int) -> list[First]:
    """A short prompt and one as long as the context."""
    each = list(firsts)
    return [f for f in each if f.prompt in (512, context)] or each[-1:]


def _cost(a: Answer) -> list[str]:
    c = a.costs
    if c is None:
        return []
    words = (
        f"{dollars(c.per_million_in)} a million tokens of prompts, {dollars(c.per_million_out)} a million new ones: "
    )
    words += f"{dollars(c.usd_per_hour)} an hour ({market(c.source)}), busy {c.utilization:.0%} of it"
    lines = _said("cost", words)
    month = f"{dollars(c.monthly)} a month for up to {c.capacity:,.0f} million tokens, {c.inputs:g} in to one out"
    if v := a.against:
        month += f"; hosted they cost {dollars(v.hosted)} a million: "
        if v.first is None:
            month += "renting never pays"
        else:
            month += f"renting pays above {v.first:,.0f} million or {dollars(v.first_bill or 0)} a month"
            if v.always and v.always > v.first * 1.001:
                month += f", always above {v.always:,.0f} million ({v.always_targets} of them)"
    lines += _said(" ", month)
    if p := a.purchase:
        when = f"earned back in {p.months:.0f} months of renting" if p.months else "never earned back"
        lines += _said(" ", f"bought for {dollars(p.usd)} ({market(a.purchase_source)}): {when}")
    return lines


def _steps(steps: Iterable[Step]) -> list[str]:
    lines = ["  the next steps down"]
    for step in steps:
        many = step.largest_batch or 0
        room = f"up to {step.largest_context or 0:,} tokens, {many:,} sequence{'' if many == 1 else 's'}"
        what = room if step.fit.fits else "does not fit"
        lines.append(f"    {step.name:<48} {units.size(step.nbytes):>9}  {w.engine(step.fit.engine):<13} {what}")
    return lines if len(lines) > 1 else []


_COLUMNS = "{:<24}{:<13}{:>7}{:>8}{:>9}{:>6}{:>20}{:>9}{:>9}"


def _table(result: Estimate) -> list[str]:
    shown = relevant(result)
    each = [a for a in shown if a.fit.fits]
    head = "device", "engine", "needs", "of GiB", "context", "seqs", "decode tok/s", "first", "$/M out"
    lines = [_COLUMNS.format(*head)]
    for a in each:
        context, batch = a.fit.largest_context(a.fit.batch), a.fit.largest_batch(a.fit.context)
        first = at_context(a)
        p = a.speeds.decode if a.speeds else None
        speed = f"{p.tokens_per_s:,.0f} ({p.low:,.0f} to {p.high:,.0f})" if p else "-"
        cost = f"{a.costs.per_million_out:.2f}" if a.costs else "-"
        needs, usable = (f"{n / _GIB:.1f}" for n in (a.fit.memory.total, a.fit.usable or 0))
        wait = seconds(first.seconds) if first else "-"
        room = _count(context), _count(batch)
        lines.append(_COLUMNS.format(a.target.spec, w.engine(a.engine), needs, usable, *room, speed, wait, cost))
    more = sum(bool(a.fit.fits) for a in result.answers) - len(each)
    lines += [f"and {more} more that fit: they stand in the report"] if more else []
    return [*lines, *_rest(result)]


def _rest(result: Estimate) -> list[str]:
    """Those on which it does not fit, and those of which nobody knows."""
    lines: list[str] = []
    short = [a for a in ordered(result) if a.fit.fits is False and not a.fit.problem]
    if short:
        near = ", ".join(f"{a.target.spec} ({units.size(-(a.fit.spare or 0))} short)" for a in short[:4])
        lines += _said("", f"does not fit: {near}" + (f", and {len(short) - 4} more" if len(short) > 4 else ""))
    unknown = [a for a in result.answers if a.fit.fits is None]
    if unknown:
        lines += _said(
            "", f"unknown: {len(unknown)} whose memory is their owner's choice, such as {unknown[0].target.spec}"
        )
    refused = [a for a in result.answers if a.fit.problem]
    if refused:
        lines += _said("", f"not run: {len(refused)}, such as {refused[0].target.spec}: {refused[0].fit.problem}")
    return lines


def _footing(result: Estimate) -> list[str]:
    lines = _said("", f"weights: {result.subject.basis}")
    if result.money.hosted and any(a.against for a in result.answers):
        usd = f"${result.money.hosted[0]:g} in, ${result.money.hosted[1]:g} out"
        lines += _said("", f"hosted price: {usd} a million tokens, {market(result.money.hosted_source)}")
    return lines


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value // 1024}k" if value >= 10240 else str(value)
