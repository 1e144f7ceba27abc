"""The report of a profile: JSON for machines, Markdown to paste, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from .. import units
from ..measure.engines import render as sweeps
from ..measure.types import Memory, Profile
from . import charts, tables
from .tables import Table
from .text import cell, markdown_table, plain_table
from .wording import against, cards, fit_words, headline_scores, setting, short_name, status, verdict

NAMES = ("profile.json", "profile.md", "profile.html")


def write(result: Profile, folder: Path) -> list[Path]:
    """Write the three files into `folder`, each whole or not at all. Raises QkitError where that fails."""
    from ..storage.local import LocalStore
    from ..storage.writer import write_file

    bodies = (to_json(result), to_markdown(result), to_html(result))
    for name, body in zip(NAMES, bodies, strict=True):
        write_file(LocalStore(folder), name, body.encode())
    return [folder / name for name in NAMES]


def to_json(result: Profile) -> str:
    return json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n"


def to_markdown(result: Profile) -> str:
    """The same tables as Markdown, without percentiles and hashes, which the other two files have."""
    said = status(result)
    out = [f"# {cell(short_name(result.model))}", "", cell(verdict(result)), ""]
    if said:
        out += [f"**{cell(said)}**", ""]
    out += markdown_table(["", ""], [[c["title"], f"{c['value']} ({c['note']})"] for c in cards(result)])
    for title, table in _sections(result):
        out += ["", f"## {cell(title)}", "", *markdown_table(*table)]
    out += ["", "## How each figure is defined", ""]
    out += [f"- **{cell(name)}**: {cell(formula)}" for name, formula in result.formulas.items()]
    fence = "`" * max(3, 1 + _longest_run(result.provenance["command"]))
    out += ["", "## Reproduce", "", fence, result.provenance["command"], fence, ""]
    out += [f"Percentiles, fingerprints and every time: {NAMES[0]}, {NAMES[2]}.", ""]
    return "\n".join(out)


def _longest_run(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)


def _sections(result: Profile) -> list[tuple[str, Table]]:
    """What every report shows; the first is the quality, the last the facts."""
    compared = against(result)
    return [
        (f"Quality {compared}".rstrip(), tables.quality(result)),
        ("Speed (measured)", tables.speed(result)),
        ("Memory", tables.memory(result)),
        *sweeps.sections(result.sweeps),
        ("Measured on", tables.facts(result)),
    ]


def _folded(result: Profile) -> list[tuple[str, Table, str]]:
    """What the page folds away, with the class of its table."""
    found = tables.percentiles(result)
    folded = [(f"Percentiles {against(result)}".rstrip(), found, "")] if found else []
    return [*folded, ("Hashes and how it was converted", tables.records(result), "facts")]


def to_html(result: Profile) -> str:
    """One self-contained page: inline style and charts, no script, nothing fetched."""
    import jinja2

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    compared = headline_scores(result).against
    named = list(zip(tables.heads(result), tables.rows(result), strict=True))
    bars = [(head, _parts(row.memory)) for head, row in named]
    latency = [(css, head, row.speed[0].tpot) for css, (head, row) in zip(("packed", "base"), named, strict=False)]
    return environment.from_string(template).render(
        title=short_name(result.model),
        verdict=verdict(result),
        status=status(result),
        passed=result.passed,
        cards=cards(result),
        sections=_sections(result),
        folded=_folded(result),
        formulas=result.formulas,
        command=result.provenance["command"],
        legend=_parts(result.model.memory),
        memory_chart=charts.stacked_bars(bars),
        memory_note=_memory_note(result.model.memory),
        fit=fit_words(result.model.memory),
        kld_chart=charts.log_percentiles(compared.kld_percentiles, compared.kld.value) if compared else None,
        against=against(result),
        latency_chart=charts.histogram(latency),
        protocol=result.provenance["headline_protocol"],
        text=result.text,
        device=result.device["name"],
        version=result.provenance["qkit"],
        date=result.provenance["date"],
    )


def _parts(memory: Memory) -> list[charts.Part]:
    """The measured total by part; what was not measured has no bytes here."""
    return [
        charts.Part("packed", "packed linears", memory.packed),
        charts.Part("embeddings", "embedding", memory.embeddings),
        charts.Part("unquantized", "not quantized", memory.unquantized),
        charts.Part("kv", "KV cache", memory.kv_cache or 0),
        charts.Part("activations", "activations", memory.activations or 0),
        charts.Part("process", "the process", memory.process or 0),
    ]


def _memory_note(memory: Memory) -> str:
    if memory.total is None:
        return "Weights alone, measured."
    return f"Measured in a process of the model's own, at {setting(memory)} (--context)."


def summary(result: Profile) -> str:
    """What the command line prints: the headline, both protocols, where the report is."""
    top, memory, text = cards(result), result.model.memory, result.text
    width = max(len(c["title"]) for c in top)
    lines = [result.model.name, "", *(f"  {c['title']:<{width}}  {c['value']:<12} {c['note']}" for c in top)]
    lines += ["", *plain_table(*tables.quality(result)), "", *plain_table(*tables.speed(result)), ""]
    for title, table in sweeps.sections(result.sweeps):
        lines += [f"  {title}", "", *plain_table(*table), ""]
    total = f"{units.size(memory.total)} at {setting(memory)}, " if memory.total is not None else ""
    lines.append(f"  memory  {total}{fit_words(memory)}")
    lines.append(f"  text    {text.name}, {text.chunks} x {text.n_ctx} tokens; {text.overlap}")
    lines.append(f"  report  {Path(result.out) / NAMES[2]}")
    said = status(result)
    return "\n".join([*lines, *([f"  {said}"] if said else [])])
