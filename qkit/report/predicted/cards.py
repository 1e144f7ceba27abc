"""The figures on top of a prediction: title, value, and what it is held against."""

from __future__ import annotations

from ... import units
from ...estimate.answer import Answer
from ...estimate.estimate import Estimate
from .choose import at_context, decode_rate, fits, known, nearest, per_million, smallest
from .shown import dollars, interval, market, number, seconds, tokens

Card = dict[str, str]


def cards(result: Estimate) -> list[Card]:
    return _of_one(result.answers[0]) if len(result.answers) == 1 else _of_many(result)


def _card(title: str, value: str, note: str) -> Card:
    return {"title": title, "value": value, "note": note}


def _of_one(a: Answer) -> list[Card]:
    return [_memory(a), _context(a), *_speed(a), _cost(a)]


def _memory(a: Answer) -> Card:
    fit = a.fit
    verdict = {True: "fits", False: "does not fit", None: "unknown"}[fit.fits]
    need = f"{units.size(fit.memory.total)}{' on each' if a.target.count > 1 else ''}"
    if fit.usable is None:
        room = "needed; what is usable is not known"
    else:
        room = f"{'needed, ' if fit.fits is False else 'of '}{units.size(fit.usable)} usable"
    return _card("Memory", verdict, fit.problem or f"{need} {room}")


def _context(a: Answer) -> Card:
    fit = a.fit
    batch = fit.largest_batch(fit.context)
    many = f"not even {fit.context:,}"
    if batch:
        many = f"{batch:,} sequence{'' if batch == 1 else 's'} of {fit.context:,} at once"
    return _card("Largest context", tokens(fit.largest_context(fit.batch)), f"tokens at batch {fit.batch}; {many}")


def _speed(a: Answer) -> list[Card]:
    s, first = a.speeds, at_context(a)
    if s is None or first is None:
        return [_card(title, "unknown", a.unknown) for title in ("Decode", "First token")]
    band = f"{number(s.decode.low)} to {number(s.decode.high)}, at batch {a.fit.batch}"
    if s.loaded.sequences > a.fit.batch:
        band += f"; {number(s.loaded.tokens_per_s)} over {s.loaded.sequences:,.0f}"
    instant = f"; within 0.1 s up to {s.instant:,}" if s.instant else ""
    wait = f"{interval(first)}, after a prompt of {first.prompt:,}{instant}"
    return [
        _card("Decode", f"{number(s.decode.tokens_per_s)} tok/s", band),
        _card("First token", seconds(first.seconds), wait),
    ]


def _cost(a: Answer) -> Card:
    c, title = a.costs, "A million new tokens"
    if c is None:
        why = "it does not run there" if a.fit.fits is False else "no price, or no speed, is known"
        return _card(title, "unknown", why)
    note = f"{dollars(c.per_million_in)} of prompts; {dollars(c.usd_per_hour)}/h ({market(c.source)})"
    return _card(title, dollars(c.per_million_out), f"{note}, busy {c.utilization:.0%}")


def _of_many(result: Estimate) -> list[Card]:
    """The extremes, each with whose it is."""
    fitting, of = fits(result), len(known(result))
    if not fitting:
        near = nearest(result)
        lacks = f"nearest: {near.target.spec}, {units.size(-(near.fit.spare or 0))} short" if near else ""
        return [_card("Fits", f"none of {of}", lacks)]
    longest = max(fitting, key=lambda a: (a.fit.largest_context(a.fit.batch) or 0, -(a.fit.usable or 0)))
    context = longest.fit.largest_context(longest.fit.batch)
    own = ", the model's own maximum" if context == longest.fit.most else ""
    return [
        _card("Fits", f"{len(fitting)} of {of}", f"smallest: {smallest(fitting).target.spec}"),
        _card("Largest context", tokens(context), f"{longest.target.spec}{own}"),
        *_fastest([a for a in fitting if a.speeds]),
        *_cheapest([a for a in fitting if a.costs]),
    ]


def _fastest(timed: list[Answer]) -> list[Card]:
    found = []
    best = max(timed, key=decode_rate, default=None)
    if best and best.speeds:
        p = best.speeds.decode
        note = f"{best.target.spec}, {number(p.low)} to {number(p.high)}"
        found.append(_card("Fastest decode", f"{number(p.tokens_per_s)} tok/s", note))
    waits = [(first, a.target.spec) for a in timed if (first := at_context(a))]
    if waits:
        first, spec = min(waits, key=lambda each: each[0].seconds)
        note = f"{spec}, {interval(first)}, after {first.prompt:,} tokens"
        found.append(_card("Quickest first token", seconds(first.seconds), note))
    return found


def _cheapest(priced: list[Answer]) -> list[Card]:
    cheap = min(priced, key=per_million, default=None)
    if cheap is None or cheap.costs is None:
        return []
    note = f"{cheap.target.spec}, {dollars(cheap.costs.usd_per_hour)}/h ({market(cheap.costs.source)})"
    return [_card("Cheapest million new tokens", dollars(cheap.costs.per_million_out), note)]
