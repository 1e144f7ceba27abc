"""A prediction's tables, as text: a header and rows, for whichever writer shows them."""

from __future__ import annotations

from collections.abc import Sequence

from ... import units
from ...estimate.answer import Answer
from ...estimate.document import CONTEXT_WORDS
from ...estimate.estimate import Estimate
from ...estimate.fit import BATCHES, contexts
from ...estimate.result import Predicted
from .choose import at_context, useful
from .shown import dollars, interval, market, number, seconds

Table = tuple[list[str], list[list[str]]]  # header, rows


def devices(result: Estimate, answers: Sequence[Answer]) -> Table:
    """A row for each device: whether it fits, with what context and batch, how fast, at what cost."""
    head = [
        "device",
        "engine",
        "needs",
        "usable",
        "fits",
        "largest context",
        f"sequences of {result.context:,}",
        "decode tok/s",
    ]
    head += ["nine in ten", f"first token of {result.context:,}", "$ an hour", "$ a million out"]
    return head, [_device(result, a) for a in answers]


def _device(result: Estimate, a: Answer) -> list[str]:
    fit, s, c = a.fit, a.speeds, a.costs
    fits = {True: "yes", False: "no", None: "unknown"}[fit.fits]
    first = at_context(a)
    return [
        a.target.spec,
        a.engine,
        units.size(fit.memory.total),
        "unknown" if fit.usable is None else units.size(fit.usable),
        f"no: {fit.problem}" if fit.problem else fits,
        _count(fit.largest_context(fit.batch)),
        _count(fit.largest_batch(fit.context)),
        number(s.decode.tokens_per_s) if s else "-",
        f"{number(s.decode.low)} to {number(s.decode.high)}" if s else "-",
        seconds(first.seconds) if first else "-",
        dollars(c.usd_per_hour) if c else "-",
        dollars(c.per_million_out) if c else "-",
    ]


def _count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


def memory(result: Estimate) -> Table:
    """Bytes of each part on each device."""
    names = list(dict.fromkeys(t.name for a in result.answers for t in a.fit.memory.terms if t.nbytes))
    rows = [[name, *(units.size(a.fit.memory.of(name)) for a in result.answers)] for name in names]
    rows.append(["total", *(units.size(a.fit.memory.total) for a in result.answers)])
    rows.append(["usable", *("unknown" if a.fit.usable is None else units.size(a.fit.usable) for a in result.answers)])
    nominal = (a.target.device.memory_gib for a in result.answers)
    rows.append(["nominal", *("unknown" if gib is None else units.size(gib * (1 << 30)) for gib in nominal)])
    return ["on each device", *(a.target.spec for a in result.answers)], rows


def bases(result: Estimate, answers: Sequence[Answer]) -> Table:
    """What each figure rests on; said once where it is the same on several devices."""
    found: dict[tuple[str, str], list[str]] = {}
    for a in answers:
        for t in a.fit.memory.terms:
            found.setdefault((t.name, t.basis), []).append(a.target.spec)
        found.setdefault(("usable", a.fit.usable_words), []).append(a.target.spec)
        if a.speeds:
            found.setdefault(("speed", a.speeds.decode.basis), []).append(a.target.spec)
        if a.slow:
            found.setdefault(("kernels", a.slow), []).append(a.target.spec)
        if a.costs:
            found.setdefault(("price an hour", a.costs.source), []).append(a.target.spec)
        if a.purchase:
            found.setdefault(("price to buy", a.purchase_source), []).append(a.target.spec)
    rows = [["weights of the model", "", result.subject.basis], ["KV cache of one sequence", "", kv_words(result)]]
    if result.money.hosted:
        rows.append(["hosted price", "", f"{_hosted(result)}: {result.money.hosted_source}"])
    rows += [[name, "all" if len(of) == len(answers) else ", ".join(of), words] for (name, words), of in found.items()]
    return ["figure", "devices", "what it rests on"], rows


def kv_words(result: Estimate) -> str:
    from ...estimate.cache import kv

    return kv(result.subject.arch, result.context, 1, result.kv_dtype or "BF16").formula


def _hosted(result: Estimate) -> str:
    assert result.money.hosted is not None
    return f"${result.money.hosted[0]:g} in, ${result.money.hosted[1]:g} out a million tokens"


def first_tokens(result: Estimate) -> Table | None:
    """Seconds until the first new token, by the length of the prompt; None where no speed is known."""
    timed = [a for a in result.answers if a.speeds]
    prompts = sorted({f.prompt for a in timed if a.speeds for f in a.speeds.first})
    if not prompts:
        return None
    rows = []
    for prompt in prompts:
        known = [next((f for f in a.speeds.first if f.prompt == prompt), None) for a in timed if a.speeds]
        rows.append(
            [f"{prompt:,} tokens", *("-" if f is None else f"{seconds(f.seconds)} ({interval(f)})" for f in known)]
        )
    instant = [f"{a.speeds.instant:,} tokens" if a.speeds and a.speeds.instant else "none" for a in timed]
    return ["prompt of", *(a.target.spec for a in timed)], [*rows, ["longest within 0.1 s", *instant]]


def speeds(result: Estimate) -> Table | None:
    """Tokens a second and what binds them; None where no speed is known."""
    timed = [a for a in result.answers if a.speeds]
    if not timed:
        return None
    rows = []
    for a in timed:
        assert a.speeds is not None
        s = a.speeds
        of = f"{a.target.spec}, {a.engine}" if len(result.answers) > 1 else a.engine
        for what, p in (
            (f"decode, batch {a.fit.batch}", s.decode), (f"decode, {s.loaded.sequences:,.0f} sequences", s.loaded),
            ("prefill", s.prefill),
        ):  # fmt: skip
            rows.append([f"{of}: {what}", number(p.tokens_per_s), f"{number(p.low)} to {number(p.high)}", p.bound])
    return ["", "tokens/s", "nine in ten", "bound by"], rows


def costs(result: Estimate) -> Table | None:
    """Dollars, a column for each device; None where no price is known."""
    priced = [a for a in result.answers if a.costs]
    if not priced:
        return None
    columns = [_cost(a) for a in priced]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return ["", *(a.target.spec for a in priced)], rows


def _cost(a: Answer) -> dict[str, str]:
    c, v, p = a.costs, a.against, a.purchase
    assert c is not None
    pays = "no hosted price is known"
    if v is not None:
        pays = "never" if v.first is None else f"{v.first:,.0f} million tokens or {dollars(v.first_bill or 0)} a month"
        if v.first is not None and v.always and v.always > v.first * 1.001:
            pays += f"; always above {v.always:,.0f} million ({v.always_targets} of them)"
    bought = "no price is known"
    if p is not None:
        bought = f"{dollars(p.usd)}, " + (
            f"earned back in {p.months:.0f} months of renting" if p.months else "never earned back"
        )
    return {
        "an hour": f"{dollars(c.usd_per_hour)} ({market(c.source)})",
        "a million tokens of prompts": dollars(c.per_million_in),
        "a million new tokens": dollars(c.per_million_out),
        f"a million tokens, {c.inputs:g} in to one out": dollars(c.per_million),
        "the same, hosted": "unknown" if v is None else dollars(v.hosted),
        f"a month, busy {c.utilization:.0%} of it": f"{dollars(c.monthly)} for up to {c.capacity:,.0f} million tokens",
        "beats the hosted price above": pays,
        "bought": bought,
    }


def steps(result: Estimate, index: int) -> Table | None:
    """The next steps down on a device that are of use; None where there are none."""
    kept = useful(result, index)
    if not kept:
        return None
    head = ["format and scheme", "weights", "engine", "fits", "largest context", "sequences"]
    return head, [
        [
            step.name, units.size(step.nbytes), step.fit.engine, "yes" if step.fit.fits else "no",
            _count(step.largest_context), _count(step.largest_batch),
        ]
        for step in kept
    ]  # fmt: skip


def room(a: Answer) -> tuple[list[str], list[tuple[str, list[tuple[str, bool | None]]]]]:
    """The map of contexts and batches: (batches, (context, (GB needed, whether they fit) of each batch) rows)."""
    fit = a.fit
    rows = []
    for context in contexts(fit):
        cells = [(_gb(fit.needs(context, n)), None if fit.usable is None else fit.fits_at(context, n)) for n in BATCHES]
        rows.append((f"{context:,}", cells))
    return [str(n) for n in BATCHES], rows


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.0f}" if nbytes >= 99.95e9 else f"{nbytes / 1e9:.1f}"


def room_table(a: Answer) -> Table:
    """The same as text."""
    batches, rows = room(a)
    sign = {True: "", False: " ✗", None: " ?"}
    return ["context", *(f"batch {n}" for n in batches)], [
        [name, *(text + sign[ok] for text, ok in cells)] for name, cells in rows
    ]


def facts(result: Estimate) -> Table:
    """What the model is."""
    s = result.subject
    arch = s.arch
    active = arch.active_parameters
    count = f"{arch.parameters / 1e9:.2f} B parameters"
    count += f", {active / 1e9:.2f} B of them active" if active < 0.8 * arch.parameters else ""
    classes = ", ".join(f"{role} {units.size(n)}" for role, n in s.weights.by_class.items())
    return ["", ""], [
        ["model", f"{s.label} ({s.base_model})" if s.base_model not in ("", s.label) else s.label],
        [
            "architecture",
            f"{arch.model_type}, {arch.basis}: {count}, {len(arch.layers)} layers",
        ],
        ["weights", f"{s.stored}: {units.size(s.weights.total)}, {s.bits_per_weight:.2f} bits per weight"],
        ["weights by class", classes],
        ["asked for", CONTEXT_WORDS.format(result.context, result.asked.batch, result.kv_dtype or "16 bits")],
    ]


def provenance(result: Predicted) -> Table:
    p = result.provenance
    return ["", ""], [
        ["qkit", f"{p['qkit']}, Python {p['python']}, {p['system']}"],
        ["date", p["date"]],
        ["speeds fitted on", p["speed_fit"] or "unknown"],
    ]
