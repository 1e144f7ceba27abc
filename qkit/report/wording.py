"""What a profile says in words: the cards on top, the verdict, and how figures are written."""

from __future__ import annotations

import math
from pathlib import Path

from .. import units
from ..measure.quality import Estimate, Scores
from ..measure.types import Measured, Memory, Profile
from . import charts
from .layout import thresholds_met


def pm(estimate: Estimate) -> str:
    """A value and its standard error to the same place: two digits of the error, at least two decimals."""
    if not estimate.error:
        return f"{charts.figure(estimate.value)} ± 0"
    least = 2 if abs(estimate.value) < 1000 else 0
    places = min(8, max(least, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:,.{places}f} ± {estimate.error:,.{places}f}"


def percent(value: float) -> str:
    return f"{value:.2%}"


def short(name: str) -> str:
    """The folder's or file's own name: a report that is passed on needs no paths in its title."""
    return Path(name.rstrip("/")).name or name


def names(result: Profile) -> list[str]:
    """Of the models: their own, or what they were named where two have the same."""
    found = [short(row.name) for row in result.models]
    return found if len({*found}) == len(found) else [row.name for row in result.models]


def title(result: Profile) -> str:
    if not is_several(result):
        return names(result)[0]
    against = f" against {short(result.baseline.name)}" if result.baseline else ""
    return f"{len(result.models) + len(result.failed)} models{against}"


def is_several(result: Profile) -> bool:
    return len(result.models) + len(result.failed) > 1


def headline(result: Profile, row: Measured) -> Scores | None:
    """The figures that headlines and thresholds use; None where quality was not measured."""
    return row.quality[result.provenance["headline_protocol"]] if row.quality else None


def setting(memory: Memory) -> str:
    """The context and the batch that memory was measured at."""
    return f"{memory.tokens:,} tokens x batch {memory.batch}"


def against(result: Profile) -> str:
    """What the comparison is with where that is itself quantized, said wherever one is made; else nothing."""
    return result.baseline.as_baseline if result.baseline else ""


def cards(result: Profile) -> list[dict[str, str]]:
    """The four figures on top: title, value, and what it is held against."""
    return _cards_of_several(result) if len(result.models) > 1 else _cards_of_one(result)


def _cards_of_one(result: Profile) -> list[dict[str, str]]:
    row, base = result.models[0], result.baseline
    scores = headline(result, row)
    size = {"title": "Size on disk", "value": units.size(row.stored_bytes), "note": _size_note(row, base)}
    if scores is not None and scores.against is not None:
        return [size, *_divergence_cards(result, scores), _rate_card(row, base)]
    memory = {
        "title": "Memory",
        "value": "not measured" if row.memory.total is None else units.size(row.memory.total),
        "note": f"at {setting(row.memory)}, {fit_words(row.memory)}",
    }
    if scores is None:
        ppl = {"title": "Quality", "value": "not measured", "note": "; ".join(row.problems)}
    else:
        ppl = {"title": "Perplexity", "value": charts.figure(scores.perplexity.value), "note": "no baseline given"}
    return [size, memory, ppl, _rate_card(row, base)]


def _divergence_cards(result: Profile, scores: Scores) -> list[dict[str, str]]:
    assert scores.against is not None
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
    return [kld, top]


def _rate_card(row: Measured, base: Measured | None) -> dict[str, str]:
    if not row.speed:
        return {"title": "Generate", "value": "not timed", "note": untimed(row)}
    first = row.speed[0]
    note = f"bare step {first.decode_tps:.1f}, prefill {first.prefill_tps:,.0f} tok/s"
    if base and base.speed and row.faster is not None:
        note = f"{row.faster:.2f}x the baseline's {base.speed[0].generate_tps:.1f}; {note}"
    return {"title": f"Generate, batch {first.batch}", "value": f"{first.generate_tps:.1f} tok/s", "note": note}


def _cards_of_several(result: Profile) -> list[dict[str, str]]:
    """The extremes, each with whose it is."""
    named = list(zip(names(result), result.models, strict=True))
    smallest, row = min(named, key=lambda each: each[1].stored_bytes)
    found = [
        {
            "title": "Smallest on disk",
            "value": units.size(row.stored_bytes),
            "note": f"{smallest}, {_size_note(row, result.baseline)}",
        }
    ]
    scored = [(name, scores) for name, row in named if (scores := headline(result, row))]
    close = [(name, scores.against) for name, scores in scored if scores.against]
    compared = f"; {against(result)}" if against(result) else ""
    if close:
        name, best = min(close, key=lambda each: each[1].kld.value)
        value, error = charts.figure(best.kld.value), pm(best.kld).split(" ± ")[1]
        found.append({"title": "Lowest KL divergence", "value": value, "note": f"{name}, ± {error}{compared}"})
        name, best = max(close, key=lambda each: each[1].same_top.value)
        value, error = f"{best.same_top.value:.1%}", f"{best.same_top.error:.1%}"
        found.append({"title": "Highest top-1 agreement", "value": value, "note": f"{name}, ± {error}{compared}"})
    elif scored:
        name, lowest = min(scored, key=lambda each: each[1].perplexity.value)
        value = charts.figure(lowest.perplexity.value)
        found.append({"title": "Lowest perplexity", "value": value, "note": f"{name}, no baseline given"})
    timed = [(name, row) for name, row in named if row.speed]
    if timed:
        name, row = max(timed, key=lambda each: each[1].faster or each[1].speed[0].generate_tps)
        card = _rate_card(row, result.baseline)
        found.append(
            {**card, "title": f"Fastest generate, batch {row.speed[0].batch}", "note": f"{name}, {card['note']}"}
        )
    return found


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
    """One sentence or two that say what the model cost."""
    return _verdict_of_several(result) if len(result.models) > 1 else _verdict_of_one(result)


def _verdict_of_one(result: Profile) -> str:
    row, base = result.models[0], result.baseline
    scores = headline(result, row)
    compared = scores.against if scores else None
    if base is None or compared is None:
        memory = row.memory
        rate = f"{row.speed[0].generate_tps:.1f} tokens/s when generating." if row.speed else f"{untimed(row)}."
        if memory.total is None:
            return f"{units.size(memory.weights)} of weights, {rate}"
        return f"{units.size(memory.total)} of memory at {setting(memory)}, {rate}"
    saved = base.stored_bytes - row.stored_bytes
    words = f"Saves {units.size(saved)} of" if saved >= 0 else f"Adds {units.size(-saved)} to"
    stored, it = units.size(base.stored_bytes), "the model before"
    if base.quantized_as:
        stored = f"the {stored} stored of a baseline that is itself quantized ({base.quantized_as})"
        it = "that baseline"
    kept = f"{words} {stored}, chooses the same next token as {it} {compared.same_top.value:.1%} of the time"
    if row.faster is not None:
        return f"{kept}, and generates at {row.faster:.2f} times its speed."
    kept = kept.replace(", chooses", " and chooses")
    return f"{kept}. Speed was not compared: {untimed(base if row.speed else row)}."


def untimed(row: Measured) -> str:
    """Why there is no speed."""
    return "; ".join(row.problems) or row.speed_how


def _verdict_of_several(result: Profile) -> str:
    named = list(zip(names(result), result.models, strict=True))
    worth = [name for name, row in named if row.on_frontier]
    beaten = [name for name, row in named if row.on_frontier is False]
    if not worth:
        return f"{len(named)} models, measured one after the other."
    first = f"{_listed(worth)} {'is' if len(worth) == 1 else 'are'} worth choosing from"
    if not beaten:
        return f"{first}: none of them is beaten in size, closeness to {_base(result)} and speed at once."
    others = f"{_listed(beaten)} {'is' if len(beaten) == 1 else 'are'} beaten by another that is as small, as close"
    return f"{first}; {others} to {_base(result)} and as fast."


def _base(result: Profile) -> str:
    base = result.baseline
    return (
        f"a baseline that is itself quantized ({base.quantized_as})" if base and base.quantized_as else "the baseline"
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def fit_words(memory: Memory) -> str:
    """Whether it fits what was free, with the share, the free and the total memory of the device."""
    of = f"{units.size(memory.free_bytes)} free of the device's {units.size(memory.device_bytes)}"
    if memory.total is None:
        return f"not measured ({memory.problem}); {of}"
    return f"{'fits' if memory.fits else 'does NOT fit'}: {memory.total / max(1, memory.free_bytes):.1%} of {of}"


def status(result: Profile) -> str:
    """Whether the thresholds were met, and what failed; nothing where there are none and nothing did."""
    problems = result.problems
    missed = [failure for failure in result.failures if failure not in problems]
    said = []
    if missed:
        said.append("Threshold missed: " + "; ".join(missed))
    elif result.thresholds:
        said.append(thresholds_met(result.thresholds))
    if problems:
        said.append("Failed: " + "; ".join(problems))
    return ". ".join(said)
