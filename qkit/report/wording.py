"""What a profile says in words: the cards on top, the verdict, and how figures are written."""

from __future__ import annotations

import math
from pathlib import Path

from .. import units
from ..measure.quality import Estimate, Scores
from ..measure.types import Measured, Memory, Profile
from . import charts


def pm(estimate: Estimate) -> str:
    """A value and its standard error to the same place: two digits of the error, at least two decimals."""
    if not estimate.error:
        return f"{charts.figure(estimate.value)} ± 0"
    least = 2 if abs(estimate.value) < 1000 else 0
    places = min(8, max(least, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:,.{places}f} ± {estimate.error:,.{places}f}"


def percent(value: float) -> str:
    return f"{value:.2%}"


def short_name(row: Measured) -> str:
    """The folder's or file's own name: a report that is passed on needs no paths in its title."""
    return Path(row.name.rstrip("/")).name or row.name


def headline_scores(result: Profile) -> Scores:
    return result.quality[result.provenance["headline_protocol"]]


def setting(memory: Memory) -> str:
    """The context and the batch that memory was measured at."""
    return f"{memory.tokens:,} tokens x batch {memory.batch}"


def against(result: Profile) -> str:
    """What the comparison is with where that is itself quantized, said wherever one is made; else nothing."""
    return result.baseline.as_baseline if result.baseline else ""


def cards(result: Profile) -> list[dict[str, str]]:
    """The four figures on top: title, value, and what it is held against."""
    row, base = result.model, result.baseline
    scores = headline_scores(result)
    size = {"title": "Size on disk", "value": units.size(row.stored_bytes), "note": _size_note(row, base)}
    first = row.speed[0]
    rate = {
        "title": f"Generate, batch {first.batch}",
        "value": f"{first.generate_tps:.1f} tok/s",
        "note": f"bare step {first.decode_tps:.1f}, prefill {first.prefill_tps:,.0f} tok/s",
    }
    if base:
        faster = first.generate_tps / base.speed[0].generate_tps
        rate["note"] = f"{faster:.2f}x the baseline's {base.speed[0].generate_tps:.1f}; " + rate["note"]
    if scores.against is None:
        memory = {
            "title": "Memory",
            "value": "not measured" if row.memory.total is None else units.size(row.memory.total),
            "note": f"at {setting(row.memory)}, {fit_words(row.memory)}",
        }
        ppl = {"title": "Perplexity", "value": charts.figure(scores.perplexity.value), "note": "no baseline given"}
        return [size, memory, ppl, rate]
    compared = f"; {against(result)}" if against(result) else ""
    kld = {
        "title": "KL divergence",
        "value": charts.figure(scores.against.kld.value),
        "note": f"± {pm(scores.against.kld).split(' ± ')[1]}; perplexity "
        f"{charts.figure(scores.against.perplexity.value)} → {charts.figure(scores.perplexity.value)}{compared}",
    }
    top = {
        "title": "Top-1 agreement",
        "value": f"{scores.against.same_top.value:.1%}",
        "note": f"± {scores.against.same_top.error:.1%} over {scores.tokens:,} tokens{compared}",
    }
    return [size, kld, top, rate]


def _size_note(row: Measured, base: Measured | None) -> str:
    """Bits per weight, and the size beside the baseline's: as stored, and as it runs where that is another."""
    note = f"{row.bits_per_weight:.2f} bits per weight"
    if base is None:
        return f"{note}; expands to {units.size(row.memory.weights)} in memory" if _expands(row) else note
    change = _change(row.stored_bytes, base.stored_bytes)
    if not base.quantized_as:
        return f"{change} than {units.size(base.stored_bytes)}; {note}"
    compared = f"{change} than the {units.size(base.stored_bytes)} stored of a baseline that is itself quantized"
    if _expands(base) and _expands(row):
        compared += f"; they expand here to {units.size(row.memory.weights)} and {units.size(base.memory.weights)}"
    elif _expands(base):
        compared += f", {_change(row.memory.weights, base.memory.weights)} than the "
        compared += f"{units.size(base.memory.weights)} it expands to"
    return f"{compared}; {note}"


def _change(ours: int, theirs: int) -> str:
    change = ours / theirs - 1
    return f"{abs(change):.0%} {'smaller' if change <= 0 else 'larger'}"


def _expands(row: Measured) -> bool:
    """Whether it runs dequantized, in more memory than it is stored in."""
    return row.stored_quantized and not row.schemes and row.memory.weights > row.stored_bytes


def verdict(result: Profile) -> str:
    """One sentence that says what the model cost."""
    row, base = result.model, result.baseline
    compared = headline_scores(result).against
    if base is None or compared is None:
        memory, rate = row.memory, f"{row.speed[0].generate_tps:.1f} tokens/s when generating."
        if memory.total is None:
            return f"{units.size(memory.weights)} of weights, {rate}"
        return f"{units.size(memory.total)} of memory at {setting(memory)}, {rate}"
    saved = base.stored_bytes - row.stored_bytes
    words = f"Saves {units.size(saved)} of" if saved >= 0 else f"Adds {units.size(-saved)} to"
    stored, it = units.size(base.stored_bytes), "the model before"
    if base.quantized_as:
        stored = f"the {stored} stored of a baseline that is itself quantized ({base.quantized_as})"
        it = "that baseline"
    ratio = row.speed[0].generate_tps / base.speed[0].generate_tps
    return (
        f"{words} {stored}, chooses the same next token as {it} {compared.same_top.value:.1%} of the time, and "
        f"generates at {ratio:.2f} times its speed."
    )


def fit_words(memory: Memory) -> str:
    """Whether it fits what was free, with the share, the free and the total memory of the device."""
    of = f"{units.size(memory.free_bytes)} free of the device's {units.size(memory.device_bytes)}"
    if memory.total is None:
        return f"not measured ({memory.problem}); {of}"
    return f"{'fits' if memory.fits else 'does NOT fit'}: {memory.total / max(1, memory.free_bytes):.1%} of {of}"


def status(result: Profile) -> str:
    """Whether the thresholds were met; nothing where there are none."""
    if result.failures:
        return "Threshold missed: " + "; ".join(result.failures)
    if result.thresholds:
        return "Thresholds met: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in result.thresholds.items())
    return ""
