"""The report of a profile: JSON for machines, Markdown to paste, and one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from .. import units
from ..measure.engines import render as sweeps
from ..measure.types import Memory, Profile
from . import beside, drawings, page, tables
from .folder import NAMES, save
from .layout import as_json, cell, fenced, markdown, plain
from .tables import Table
from .wording import against, cards, fit_words, is_several, setting, status, title, verdict


def write(result: Profile, folder: Path) -> list[Path]:
    """Write the three files into `folder`, each whole or not at all. Raises QkitError where that fails."""
    return save(folder, (to_json(result), to_markdown(result), to_html(result)))


def to_json(result: Profile) -> str:
    return as_json(result.as_dict())


def to_markdown(result: Profile) -> str:
    """The same tables as Markdown, without percentiles and hashes, which the other two files have."""
    said = status(result)
    out = [f"# {cell(title(result))}", "", cell(verdict(result)), ""]
    if said:
        out += [f"**{cell(said)}**", ""]
    out += markdown(["", ""], [[c["title"], f"{c['value']} ({c['note']})"] for c in cards(result)])
    several = [("Side by side", tables.candidates(result))] if is_several(result) else []
    for name, table in [*several, *_sections(result)]:
        out += ["", f"## {cell(name)}", "", *markdown(*table)]
    out += ["", "## How each figure is defined", ""]
    out += [f"- **{cell(name)}**: {cell(formula)}" for name, formula in result.formulas.items()]
    out += ["", "## Reproduce", "", *fenced(result.provenance["command"]), ""]
    out += [f"Percentiles, fingerprints and every time: {NAMES[0]}, {NAMES[2]}.", ""]
    return "\n".join(out)


_QUALITY = "Quality"


def _sections(result: Profile) -> list[tuple[str, Table]]:
    """What every report shows; the last are the facts."""
    compared = against(result)
    scored, timed = tables.quality(result), tables.speed(result)
    return [
        *([(f"{_QUALITY} {compared}".rstrip(), scored)] if scored else []),
        *([("Speed (measured)", timed)] if timed else []),
        *(
            [("Predicted against measured (error: predicted / measured - 1)", both)]
            if (both := beside.table(result))
            else []
        ),
        *([("Not predicted", (["", ""], lacking))] if (lacking := beside.unknown(result)) else []),
        ("Memory", tables.memory(result)),
        *sweeps.sections(result.sweeps),
        ("Measured on", tables.facts(result)),
    ]


def _folded(result: Profile) -> list[tuple[str, Table, str]]:
    """What the page folds away, with the class of its table."""
    folded = []
    for name, row in zip(tables.heads(result), result.models, strict=False):
        found = tables.percentiles(row)
        of = f"of {name} " if len(result.models) > 1 else ""
        if found:
            folded.append((f"Percentiles {of}{against(result)}".rstrip(), found, ""))
    bases = [list(each) for each in beside.bases(result)]
    folded += [("What the predictions rest on", (["figure", "basis"], bases), "facts")] if bases else []
    return [*folded, ("Hashes and how it was converted", tables.records(result), "facts headless")]


def to_html(result: Profile) -> str:
    """One self-contained page: inline style and charts, no script, nothing fetched."""
    named = list(zip(tables.heads(result), tables.rows(result), strict=True))
    one = result.models[0] if len(result.models) == 1 else None
    sections = _sections(result)
    scored = next((each for each in sections if each[0].startswith(_QUALITY)), None)
    return page.render(
        "measured.html.jinja",
        title=title(result),
        verdict=verdict(result),
        status=status(result),
        passed=result.passed,
        cards=cards(result),
        candidates=tables.candidates(result) if is_several(result) else None,
        quality=None if one is None else scored,
        sections=[each for each in sections if one is None or each is not scored],
        folded=_folded(result),
        formulas=result.formulas,
        command=result.provenance["command"],
        legend=[(part.css, part.name) for part in drawings.parts(result.models[0].memory)],
        memory_chart=drawings.memory(named),
        memory_note=_memory_note(result.models[0].memory),
        fit=fit_words(one.memory) if one else "",
        kld_chart=drawings.divergence(result, one) if one else None,
        frontier_chart=drawings.frontier(result),
        against=against(result),
        latency_chart=drawings.latency(named),
        roof_chart=drawings.roof(result) if one else None,
        sweep_charts=drawings.sweeps(result.sweeps),
        swept=drawings.swept(result.sweeps),
        protocol=result.provenance["headline_protocol"],
        text=result.text,
        overlap=tables.overlap(result),
        device=result.device["name"],
        version=result.provenance["qkit"],
        date=result.provenance["date"],
    )


def _memory_note(memory: Memory) -> str:
    if memory.total is None:
        return "Weights alone, measured."
    return f"Measured in a process of the model's own, at {setting(memory)} (--context)."


def summary(result: Profile) -> str:
    """What the command line prints: the headline, both protocols or the models side by side, where the report is."""
    top, text = cards(result), result.text
    width = max(len(c["title"]) for c in top)
    lines = [title(result) if is_several(result) else result.models[0].name, ""]
    lines += [f"  {c['title']:<{width}}  {c['value']:<12} {c['note']}" for c in top]
    shown = [tables.candidates(result) if is_several(result) else tables.quality(result), tables.speed(result)]
    shown.append(beside.table(result))
    for table in filter(None, shown):
        lines += ["", *plain(*table)]
    for name, table in sweeps.sections(result.sweeps):
        lines += ["", f"  {name}", "", *plain(*table)]
    lines.append("")
    for name, row in zip(tables.heads(result), result.models, strict=False):
        memory, of = row.memory, f"{name}: " if len(result.models) > 1 else ""
        total = f"{units.size(memory.total)} at {setting(memory)}, " if memory.total is not None else ""
        lines.append(f"  memory  {of}{total}{fit_words(memory)}")
    lines.append(f"  text    {text.name}, {text.chunks} x {text.n_ctx} tokens; {tables.overlap(result)}")
    lines.append(f"  how     {tables.how(result)}")
    lines += [f"  not predicted  {name}: {why}" for name, why in beside.unknown(result)]
    lines.append(f"  report  {Path(result.out) / NAMES[2]}")
    said = status(result)
    return "\n".join([*lines, *([f"  {said}"] if said else [])])
