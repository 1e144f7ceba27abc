"""A prediction's charts."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from ...estimate.answer import Answer
from ...estimate.estimate import Estimate
from ...estimate.intensity import Roof, Spot
from .. import charts

# CSS class of each part of the memory; parts that an engine does not have have no bytes.
PARTS = {
    "weights": "packed", "KV cache": "kv", "activations": "activations", "logits": "unquantized",
    "CUDA graphs": "embeddings", "runtime": "process",
}  # fmt: skip
_GIB = 1 << 30


def memory(answers: Sequence[Answer]) -> Markup:
    """What the model takes on each device, against what there is."""
    return charts.limited_bars([_held(a) for a in answers])


def legend(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(CSS class, name) of the parts that are drawn."""
    drawn = {t.name for a in answers for t in a.fit.memory.terms if t.nbytes}
    return [(css, name) for name, css in PARTS.items() if name in drawn]


def _held(a: Answer) -> charts.Held:
    parts = tuple(charts.Part(PARTS.get(t.name, "base"), t.name, t.nbytes) for t in a.fit.memory.terms)
    gib = a.target.device.memory_gib
    return charts.Held(a.target.spec, parts, a.fit.usable, int(gib * _GIB) if gib else None, a.fit.fits)


def rates(answers: Sequence[Answer]) -> Markup:
    """Decode of each device with its interval."""
    found = [(a.target.spec, a.speeds.decode) for a in answers if a.speeds]
    return charts.rates([(spec, p.tokens_per_s, p.low, p.high) for spec, p in found], "Decode, tokens/s predicted")


def over_batch(result: Estimate) -> Markup:
    found = [
        charts.Curve(css, a.target.spec, tuple((n, p.tokens_per_s, p.low, p.high) for n, p in a.speeds.batches))
        for css, a in _numbered(result)
        if a.speeds
    ]
    return charts.curves(found, "Decode over batch, tokens/s of all sequences, predicted", "sequences at once")


def over_context(result: Estimate) -> Markup:
    found = [
        charts.Curve(css, a.target.spec, tuple((n, p.tokens_per_s, p.low, p.high) for n, p in a.speeds.contexts))
        for css, a in _numbered(result)
        if a.speeds
    ]
    return charts.curves(found, "Decode over context, tokens/s predicted", "tokens of context")


def _numbered(result: Estimate) -> list[tuple[str, Answer]]:
    return [(f"series{i}", a) for i, a in enumerate(result.answers, 1)]


def timed(result: Estimate) -> list[tuple[str, str]]:
    """(CSS class, name) of the devices whose speed is drawn."""
    return [(css, a.target.spec) for css, a in _numbered(result) if a.speeds]


def roof(a: Answer) -> Markup | None:
    """None where no speed is known."""
    found = a.speeds.roof if a.speeds else None
    return charts.roofline(found.bandwidth, found.peak, _spots(found), "predicted") if found else None


def _spots(found: Roof) -> list[charts.Spot]:
    """Decode at the first, the last and a middle batch, and prefill: what a drawing has room for."""
    decodes = [s for s in found.spots if s.phase == "decode"]
    most = decodes[-1].sequences if decodes else 1
    kept = {1, most, *[s.sequences for s in decodes if s.sequences**2 <= most][-1:]}
    return [
        charts.Spot(_name(s), s.phase == "prefill", s.operations_per_byte, s.operations_per_s, s.low, s.high)
        for s in found.spots
        if s.phase == "prefill" or s.sequences in kept
    ]


def _name(s: Spot) -> str:
    return f"prefill {s.tokens:,}" if s.phase == "prefill" else f"batch {s.sequences}"


def bills(result: Estimate) -> Markup | None:
    """None where no price is known."""
    found = [
        charts.Bill(
            css, a.target.spec, a.costs.monthly, a.costs.capacity, a.against.first if a.against else None,
            a.against.always if a.against else None,
        )
        for css, a in _numbered(result)
        if a.costs
    ]  # fmt: skip
    against = next((a.against for a in result.answers if a.against), None)
    return charts.bills(found, against.hosted if against else None) if found else None


def billed(result: Estimate) -> list[tuple[str, str]]:
    """(CSS class, name) of the devices whose bill is drawn."""
    return [(css, a.target.spec) for css, a in _numbered(result) if a.costs]
