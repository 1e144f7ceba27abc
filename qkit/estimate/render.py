"""An estimate as text: the answer first, for one device in detail, for many as a table."""

from __future__ import annotations

from collections.abc import Iterable

from .. import units
from .answer import Answer
from .estimate import Estimate
from .speed import Prediction
from .steps import Step

_GIB = 1 << 30


def describe(result: Estimate) -> str:
    lines = [*heading(result), ""]
    if result.detailed:
        for index, answer in enumerate(result.answers):
            lines += [*_detail(result, answer), ""]
            if result.steps:
                lines += [*_steps(result.steps[index]), ""]
    else:
        lines += [*_table(result), ""]
    return "\n".join([*lines, *_footing(result)]).rstrip()


def heading(result: Estimate) -> list[str]:
    s = result.subject
    active = s.arch.active_parameters
    part = f", {active / 1e9:.1f} B of them active" if active < 0.8 * s.arch.parameters else ""
    experts = "" if not part else " (mixture of experts)"
    batch = f"batch {result.asked.batch}"
    return [
        f"{s.label}: {s.arch.model_type}, {s.arch.parameters / 1e9:.2f} B parameters{part}{experts}, {len(s.arch.layers)} layers",
        f"{s.stored}: {units.size(s.weights.total)}, {s.bits_per_weight:.2f} bits per weight"
        f"{'' if s.arch.basis == 'known family' else ' - ' + s.arch.basis}",
        f"PREDICTED for a context of {result.context:,} tokens at {batch}; nothing was loaded",
    ]


def _detail(result: Estimate, a: Answer) -> list[str]:
    fit, device = a.fit, a.target.device
    count = f"{a.target.count} x " if a.target.count > 1 else ""
    verdict = {True: "FITS", False: "does NOT fit", None: "memory unknown"}[fit.fits]
    if fit.problem:
        return [f"{count}{device.name}, {a.engine}: {fit.problem}"]
    each = " on each" if a.target.count > 1 else ""
    usable = f" of {units.size(fit.usable)} usable" if fit.usable is not None else ""
    lines = [f"{count}{device.name}, {a.engine}: {verdict}", f"  memory    {units.size(fit.memory.total)}{each}{usable}"]
    lines += [f"            {units.size(t.nbytes):>10}  {t.name}" for t in fit.memory.terms if t.nbytes]
    context, batch = fit.largest_context(result.asked.batch), fit.largest_batch(result.context)
    if context:
        own = ", the model's own maximum" if context == fit.most else ""
        lines.append(f"            largest context at batch {result.asked.batch}: {context:,} tokens{own}")
    if batch:
        lines.append(f"            most sequences of {result.context:,} tokens at once: {batch:,}")
    return [*lines, *_speed(result, a), *_cost(a)]


def _speed(result: Estimate, a: Answer) -> list[str]:
    s = a.speeds
    if s is None:
        return [f"  speed     unknown: {a.unknown}"]
    lines = [f"  decode    {_rate(s.decode)}, bound by {s.decode.bound}"]
    if s.loaded.sequences > result.asked.batch:
        lines.append(f"            {_rate(s.loaded)} over {s.loaded.sequences:.0f} sequences")
    lines.append(f"  prefill   {_rate(s.prefill)}")
    firsts = ", ".join(f"{f.prompt:,} tokens {_seconds(f.seconds)} [{_seconds(f.low)} - {_seconds(f.high)}]" for f in s.first)
    lines.append(f"  first     new token after a prompt of {firsts}")
    if s.instant:
        lines.append(f"            within 0.1 s for prompts up to {s.instant:,} tokens")
    lines.append(f"  basis     {s.decode.basis}; brackets hold nine in ten")
    return lines


def _cost(a: Answer) -> list[str]:
    c = a.costs
    if c is None:
        return []
    lines = [
        f"  cost      ${c.per_million_in:.2f} in, ${c.per_million_out:.2f} out a million tokens; "
        f"${c.usd_per_hour:.2f} an hour ({c.source}), busy {c.utilization:.0%} of it, at full load",
        f"            ${c.monthly:,.0f} a month for up to {c.capacity:,.0f} million tokens, {c.inputs:g} in to one out",
    ]
    if v := a.against:
        if v.first is None:
            lines.append(f"            hosted: ${v.hosted:.2f} a million in that mix; self-hosting never pays at these prices")
        else:
            rest = f", always from {v.always:,.0f} ({v.always_targets} of them)" if v.always and v.always > v.first * 1.001 else ""
            lines.append(
                f"            hosted: ${v.hosted:.2f} a million in that mix; self-hosting pays above {v.first:,.0f} million "
                f"tokens or ${v.first_bill:,.0f} a month{rest}"
            )
    if p := a.purchase:
        when = f"earned back in {p.months:.0f} months of renting" if p.months else "never earned back"
        lines.append(f"            bought for ${p.usd:,.0f} ({a.purchase_source}): {when}, power ${p.power_per_hour:.2f} an hour")
    return lines


def _steps(steps: Iterable[Step]) -> list[str]:
    lines = ["  the next step down"]
    for step in steps:
        context, batch = step.largest_context, step.largest_batch
        what = f"fits; context up to {context:,}, {batch or 0} sequences" if step.fit.fits else "does not fit"
        lines.append(f"    {step.name:<42} {units.size(step.nbytes):>10}  {step.fit.engine:<12} {what}")
    return lines if len(lines) > 1 else []


def _table(result: Estimate) -> list[str]:
    fitting = [a for a in result.answers if a.fit.fits]
    unknown = [a for a in result.answers if a.fit.fits is None and not a.fit.problem]
    known = len(result.answers) - len(unknown)
    lines = [f"fits on {len(fitting)} of {known} devices"]
    if fitting:
        smallest = min(fitting, key=lambda a: (a.fit.usable or 0) * a.target.count)
        lines[0] += f"; the smallest is {smallest.target.spec}"
        priced = [a for a in fitting if a.costs]
        if priced:
            hour = min(priced, key=lambda a: a.costs.usd_per_hour if a.costs else 0.0)
            cheap = min(priced, key=lambda a: a.costs.per_million if a.costs else 0.0)
            lines.append(f"cheapest by the hour: {hour.target.spec}, ${hour.costs.usd_per_hour:.2f}; by the token: "  # type: ignore[union-attr]
                         f"{cheap.target.spec}, ${cheap.costs.per_million:.2f} a million")  # type: ignore[union-attr]  # fmt: skip
    head = f"{'device':<24}{'engine':<13}{'needs':>7}{'of GiB':>8}{'context':>9}{'seqs':>6}{'decode tok/s':>22}{'first':>9}{'$/M out':>9}"
    lines += ["", head]
    for a in [*sorted(fitting, key=lambda a: -(a.speeds.decode.tokens_per_s if a.speeds else 0.0)), *unknown]:
        context, batch = a.fit.largest_context(result.asked.batch), a.fit.largest_batch(result.context)
        speed = f"{a.speeds.decode.tokens_per_s:,.0f} [{a.speeds.decode.low:,.0f}-{a.speeds.decode.high:,.0f}]" if a.speeds else "-"
        first = _seconds(a.speeds.first[-1].seconds) if a.speeds and a.speeds.first else "-"
        cost = f"{a.costs.per_million_out:.2f}" if a.costs else "-"
        usable = f"{a.fit.usable / _GIB:.1f}" if a.fit.usable is not None else "?"
        lines.append(
            f"{a.target.spec:<24}{a.engine:<13}{a.fit.memory.total / _GIB:>7.1f}{usable:>8}{_count(context):>9}{_count(batch):>6}"
            f"{speed:>22}{first:>9}{cost:>9}"
        )
    short = sorted((a for a in result.answers if a.fit.fits is False and not a.fit.problem), key=lambda a: -(a.fit.spare or 0))
    if short:
        lines += ["", "does not fit: " + ", ".join(f"{a.target.spec} ({units.size(-(a.fit.spare or 0))} short)" for a in short[:6])
                  + (f", and {len(short) - 6} more" if len(short) > 6 else "")]  # fmt: skip
    return lines


def _footing(result: Estimate) -> list[str]:
    s = result.subject
    lines = [f"weights: {s.basis}"]
    if result.money.hosted and any(a.against for a in result.answers):
        lines.append(f"hosted price: ${result.money.hosted[0]:g} in, ${result.money.hosted[1]:g} out, {result.money.hosted_source}")
    return lines


def _rate(p: Prediction) -> str:
    return f"{_number(p.tokens_per_s)} tokens/s [{_number(p.low)} - {_number(p.high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value // 1024}k" if value >= 10240 else str(value)
