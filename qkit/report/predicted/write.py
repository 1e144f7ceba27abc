"""The three files of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...estimate.document import FORMULAS
from ...estimate.estimate import Estimate
from ...estimate.result import Predicted
from .. import page
from ..folder import NAMES, save
from ..layout import as_json, cell, fenced, markdown
from . import drawings, tables
from . import wording as w
from .cards import cards
from .choose import ordered, relevant
from .tables import Table


def write(result: Predicted, folder: Path) -> list[Path]:
    """Write the three files into `folder`, each whole or not at all. Raises QkitError where that fails."""
    return save(folder, (as_json(result.as_dict()), to_markdown(result), to_html(result)))


def to_markdown(result: Predicted) -> str:
    out = [f"# {cell(w.title(result))}", "", "PREDICTED: nothing was loaded, nothing was measured.", ""]
    if said := w.thresholds(result):
        out += [f"**{cell(said)}**", ""]
    level = "##" if len(result.estimates) == 1 else "###"
    for each in result.estimates:
        out += [f"## {cell(w.name(each.subject))}", ""] if len(result.estimates) > 1 else []
        out += [cell(w.verdict(each)), ""]
        out += markdown(["", ""], [[c["title"], f"{c['value']} ({c['note']})"] for c in cards(each)])
        for name, table in _sections(each):
            out += ["", f"{level} {cell(name)}", "", *markdown(*table)]
        out.append("")
    out += ["## How each figure is defined", ""]
    out += [f"- **{cell(name)}**: {cell(formula)}" for name, formula in FORMULAS.items()]
    out += ["", "## Reproduce", "", *fenced(result.provenance["command"]), ""]
    out += [f"Charts and the basis of every part: {NAMES[2]}; every figure: {NAMES[0]}.", ""]
    return "\n".join(out)


def _sections(result: Estimate) -> list[tuple[str, Table]]:
    """What both the page and Markdown show as tables, in their order."""
    shown = relevant(result)
    found: list[tuple[str, Table]] = []
    if len(result.answers) > 1:
        found.append((_devices_title(result, len(shown)), tables.devices(result, shown)))
    if not result.detailed:
        return [*found, ("The model", tables.facts(result))]
    found.append(("Memory by part", tables.memory(result)))
    for a in result.answers:
        if not a.fit.problem:
            found.append(
                (
                    f"What fits {w.device(a.target)}: GB by context and batch (✗: more than is usable)",
                    tables.room_table(a),
                )
            )
    for name, table in (
        ("Speed", tables.speeds(result)), ("Time to the first token", tables.first_tokens(result)),
        ("Cost", tables.costs(result)),
    ):  # fmt: skip
        found += [(name, table)] if table else []
    for index, a in enumerate(result.answers):
        if table := tables.steps(result, index):
            found.append((f"The next steps down on {w.device(a.target)}", table))
    return [*found, ("The model", tables.facts(result))]


def _devices_title(result: Estimate, shown: int) -> str:
    if shown == len(result.answers):
        return "Device by device"
    return f"{shown} of {len(result.answers)} devices: fastest, cheapest, smallest, nearly fitting"


def to_html(result: Predicted) -> str:
    """One self-contained page: inline style and charts, no script, nothing fetched."""
    return page.render(
        "predicted.html.jinja",
        title=w.title(result),
        status=w.thresholds(result),
        passed=result.passed,
        models=[_model(each) for each in result.estimates],
        formulas=FORMULAS,
        provenance=tables.provenance(result),
        command=result.provenance["command"],
        version=result.provenance["qkit"],
        date=result.provenance["date"],
    )


def _model(result: Estimate) -> dict[str, Any]:
    """What the page shows of one model."""
    s = result.subject
    shown = relevant(result)
    rest = [a for a in ordered(result) if a not in shown] if len(shown) < len(result.answers) else []
    return {
        "name": w.name(s),
        "kicker": f"{s.arch.model_type}, {s.arch.parameters / 1e9:.2f} B parameters, {s.stored}",
        "verdict": w.verdict(result),
        "others": [w.of_one(result, i) for i in range(len(result.answers))]
        if result.detailed and len(result.answers) > 1
        else [],
        "cards": cards(result),
        "context": result.context,
        "batch": result.asked.batch,
        "detailed": result.detailed,
        "memory": drawings.memory(shown),
        "legend": drawings.legend(shown),
        "rates": None if result.detailed else drawings.rates(shown),
        "devices": (_devices_title(result, len(shown)), tables.devices(result, shown))
        if len(result.answers) > 1
        else None,
        "rest": tables.devices(result, rest) if rest else None,
        "facts": tables.facts(result),
        "bases": tables.bases(result, result.answers if result.detailed else shown),
        **(_detail(result) if result.detailed else {}),
    }


def _detail(result: Estimate) -> dict[str, Any]:
    """Of up to four devices."""
    here = [a for a in result.answers if not a.fit.problem]
    rooms = [(w.device(a.target), w.engine(a.engine), *tables.room(a)) for a in here]
    roofs = [(w.device(a.target), drawn) for a in here if (drawn := drawings.roof(a))]
    steps = [(w.device(a.target), table) for i, a in enumerate(result.answers) if (table := tables.steps(result, i))]
    timed = drawings.timed(result)
    unknown = [(a.target.spec, a.unknown) for a in result.answers if a.speeds is None]
    return {
        "parts": tables.memory(result),
        "rooms": rooms,
        "roofs": roofs,
        "timed": timed,
        "unknown": unknown,
        "over_batch": drawings.over_batch(result) if timed else None,
        "over_context": drawings.over_context(result) if timed else None,
        "speeds": tables.speeds(result),
        "first_tokens": tables.first_tokens(result),
        "bills": drawings.bills(result),
        "billed": drawings.billed(result),
        "hosted": result.money.hosted is not None,
        "costs": tables.costs(result),
        "steps": steps,
    }
