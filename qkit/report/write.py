"""The report of a profile: JSON for machines, Markdown to paste, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .. import units
from ..measure.quality import Divergence, Estimate, Scores
from ..measure.types import Memory, Profile, Row
from . import charts

NAMES = ("profile.json", "profile.md", "profile.html")
Table = tuple[list[str], list[list[str]]]  # header, rows


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


def pm(estimate: Estimate) -> str:
    """A value and its standard error to the same place: two digits of the error, at least two decimals."""
    if not estimate.error:
        return f"{charts.figure(estimate.value)} ± 0"
    least = 2 if abs(estimate.value) < 1000 else 0
    places = min(8, max(least, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:,.{places}f} ± {estimate.error:,.{places}f}"


def percent(value: float) -> str:
    return f"{value:.2%}"


def short_name(row: Row) -> str:
    """The folder's or file's own name: a report that is passed on needs no paths in its title."""
    return Path(row.name.rstrip("/")).name or row.name


def headline_scores(result: Profile) -> Scores:
    return result.quality[result.provenance["headline_protocol"]]


def cards(result: Profile) -> list[dict[str, str]]:
    """The four figures on top: title, value, and what it is held against."""
    row, base = result.model, result.baseline
    scores = headline_scores(result)
    size = {
        "title": "Size on disk",
        "value": units.size(row.stored_bytes),
        "note": f"{row.bits_per_weight:.2f} bits per weight",
    }
    if base:
        change = row.stored_bytes / base.stored_bytes - 1
        size["note"] = (
            f"{abs(change):.0%} {'smaller' if change <= 0 else 'larger'} than {units.size(base.stored_bytes)}; "
            + size["note"]
        )
    decode = row.speed[0]
    rate = {
        "title": f"Decode, batch {decode.batch}",
        "value": f"{decode.decode_tps:.1f} tok/s",
        "note": f"prefill {decode.prefill_tps:,.0f} tok/s",
    }
    if base:
        faster = decode.decode_tps / base.speed[0].decode_tps
        rate["note"] = f"{faster:.2f}x the baseline's {base.speed[0].decode_tps:.1f}; " + rate["note"]
    if scores.against is None:
        memory = {
            "title": "Memory",
            "value": units.size(row.memory.total),
            "note": f"weights {units.size(row.memory.weights)}; {fit_words(row.memory)}",
        }
        ppl = {"title": "Perplexity", "value": charts.figure(scores.perplexity.value), "note": "no baseline given"}
        return [size, memory, ppl, rate]
    against = scores.against
    kld = {
        "title": "KL divergence",
        "value": charts.figure(against.kld.value),
        "note": f"± {pm(against.kld).split(' ± ')[1]}; perplexity {charts.figure(against.perplexity.value)} → "
        f"{charts.figure(scores.perplexity.value)}",
    }
    top = {
        "title": "Top-1 agreement",
        "value": f"{against.same_top.value:.1%}",
        "note": f"± {against.same_top.error:.1%} over {scores.tokens:,} tokens",
    }
    return [size, kld, top, rate]


def verdict(result: Profile) -> str:
    """One sentence that says what the model cost."""
    row, base = result.model, result.baseline
    against = headline_scores(result).against
    if base is None or against is None:
        return (
            f"{units.size(row.memory.total)} of memory at this context and batch, "
            f"{row.speed[0].decode_tps:.1f} tokens/s when generating."
        )
    saved = base.stored_bytes - row.stored_bytes
    words = f"saves {units.size(saved)}" if saved >= 0 else f"adds {units.size(-saved)}"
    ratio = row.speed[0].decode_tps / base.speed[0].decode_tps
    return (
        f"{words[0].upper()}{words[1:]} of {units.size(base.stored_bytes)}, chooses the same next token "
        f"{against.same_top.value:.1%} of the time, and decodes at {ratio:.2f} times the baseline's speed."
    )


def fit_words(memory: Memory) -> str:
    share = memory.total / memory.device_bytes
    return f"{_word(memory)}: {share:.1%} of the device's {units.size(memory.device_bytes)}"


def _word(memory: Memory) -> str:
    return "fits" if memory.fits else "does NOT fit"


def _rows(result: Profile) -> list[Row]:
    return [result.model] + ([result.baseline] if result.baseline else [])


def _heads(result: Profile) -> list[str]:
    return ["model", "baseline"][: len(_rows(result))]


def quality_table(result: Profile) -> Table:
    protocols = list(result.quality.protocols.values())
    lines: list[list[str]] = [["scored tokens", *(f"{s.tokens:,}" for s in protocols)]]
    lines.append(["perplexity", *(pm(s.perplexity) for s in protocols)])
    known = [s.against for s in protocols if s.against]
    if known:
        lines += [
            ["baseline perplexity", *(pm(a.perplexity) for a in known)],
            ["ln(PPL / baseline PPL)", *(pm(a.ln_ratio) for a in known)],
            ["correlation of ln p", *("-" if a.correlation is None else percent(a.correlation) for a in known)],
            ["mean KL divergence", *(pm(a.kld) for a in known)],
            ["top-1 agreement", *(f"{percent(a.same_top.value)} ± {percent(a.same_top.error)}" for a in known)],
            ["mean Δp", *(f"{percent(a.delta_p.value)} ± {percent(a.delta_p.error)}" for a in known)],
            ["RMS Δp", *(f"{percent(a.delta_p_rms.value)} ± {percent(a.delta_p_rms.error)}" for a in known)],
        ]
    return ["", *(s.protocol for s in protocols)], lines


def percentile_table(result: Profile) -> Table | None:
    protocols = [s for s in result.quality.protocols.values() if s.against]
    if not protocols:
        return None
    known: list[Divergence] = [s.against for s in protocols if s.against]
    head = ["percentile", *(f"{what}, {s.protocol}" for s in protocols for what in ("KL", "Δp"))]
    lines = []
    for name in known[0].delta_p_percentiles:
        cells = []
        for a in known:
            cells.append(charts.figure(a.kld_percentiles[name]) if name in a.kld_percentiles else "")
            cells.append(percent(a.delta_p_percentiles[name]))
        lines.append([name, *cells])
    return head, lines


def memory_table(result: Profile) -> Table:
    memories = [r.memory for r in _rows(result)]

    def line(name: str, attribute: str) -> list[str]:
        return [name, *("-" if (v := getattr(m, attribute)) is None else units.size(v) for m in memories)]

    tokens = memories[0].kv_tokens
    return ["", *(f"{h} (measured)" for h in _heads(result))], [
        line("weights", "weights"),
        line("· packed linears", "packed"),
        line("· embedding and tied head", "embeddings"),
        line("· not quantized", "unquantized"),
        line(f"KV cache, {tokens:,} tokens", "kv_cache"),
        line(f"KV cache, {tokens:,} tokens (by formula)", "kv_cache_formula"),
        line("KV cache, whole context (by formula)", "kv_cache_context"),
        line("activations, peak of prefill", "activations"),
        line("total at the whole context", "total"),
        line("process before loading", "process_before"),
        line("process after loading", "process_after"),
        ["on disk", *(units.size(r.stored_bytes) for r in _rows(result))],
        ["bits per weight", *(f"{r.bits_per_weight:.3f}" for r in _rows(result))],
        ["share of the device", *(f"{m.total / m.device_bytes:.1%}, {_word(m)}" for m in memories)],
    ]


def speed_table(result: Profile) -> Table:
    head = ["", "batch", "prompt", "TTFT", "TPOT p50", "TPOT p99", "prefill tok/s", "decode tok/s"]
    head += ["read GB/s", "of ceiling"]
    lines = []
    for name, row in zip(_heads(result), _rows(result), strict=True):
        for s in row.speed:
            lines.append([
                name, str(s.batch), f"{s.prompt:,}", f"{s.ttft_median * 1e3:,.1f} ms", f"{s.tpot_p50 * 1e3:.2f} ms",
                f"{s.tpot_p99 * 1e3:.2f} ms", f"{s.prefill_tps:,.0f}", f"{s.decode_tps:,.1f}",
                "-" if s.read_gbs is None else f"{s.read_gbs:.1f}",
                "-" if s.read_share is None else f"{s.read_share:.0%}",
            ])  # fmt: skip
    return head, lines


def facts(result: Profile) -> Table:
    """Provenance: what was measured, on what, from what."""
    p, d, row = result.provenance, result.device, result.model
    lines = [["model", f"{row.name} ({row.architecture}, {row.parameters:,} parameters, {row.dtype})"]]
    if row.schemes:
        lines.append(["quantization", ", ".join(f"{n} linears {s}" for s, n in row.schemes.items())])
    if row.kernels:
        lines.append(["kernels", ", ".join(f"{n} x {k}" for k, n in row.kernels.items()) + f" ({p['kernels']})"])
    if result.baseline:
        lines.append(["baseline", f"{result.baseline.name} ({result.baseline.dtype})"])
    cores = f", {d['cores']} cores, {d['threads']} threads" if d["cores"] else ""
    lines += [
        ["device", f"{d['name']}{cores}, {units.size(d['memory_bytes'])}; {' '.join(d['features'])}"],
        ["read ceiling", f"{d['read_ceiling_gbs']:.1f} GB/s, measured"],
        ["evaluation text", f"{result.text.name}, {result.text.chunks} x {result.text.n_ctx} tokens"
         + (", BOS in place of each chunk's first token" if result.text.bos else "")],
        ["overlap with calibration", result.text.overlap],
        ["activations seen as", row.memory.activations_source],
        ["versions", ", ".join(f"{k} {p[k]}" for k in ("qkit", "python", "torch", "transformers"))],
        ["system, date", f"{p['system']}, {p['date']}"],
        ["sha256 of the text", result.text.sha256],
        ["fingerprint of the model", p["model_fingerprint"]],
    ]  # fmt: skip
    if p["baseline_fingerprint"]:
        lines.append(["fingerprint of the baseline", p["baseline_fingerprint"]])
    if p["manifest_sha256"]:
        lines.append(["sha256 of the manifest", p["manifest_sha256"]])
    lines += [[f"converted: {k}", _plain(v)] for k, v in p["conversion"].items() if v not in (None, [], {})]
    return ["", ""], lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def to_markdown(result: Profile) -> str:
    """The same tables as Markdown."""
    status = _status(result)
    out = [f"# {_cell(short_name(result.model))}", "", verdict(result), ""]
    if status:
        out += [f"**{_cell(status)}**", ""]
    out += _markdown(["", ""], [[c["title"], f"{c['value']} ({c['note']})"] for c in cards(result)])
    for title, table in _sections(result):
        out += ["", f"## {title}", "", *_markdown(*table)]
    out += ["", "## How each figure is defined", ""]
    out += [f"- **{_cell(name)}**: {_cell(formula)}" for name, formula in result.formulas.items()]
    fence = "`" * max(3, 1 + _longest_run(result.provenance["command"]))
    out += ["", "## Reproduce", "", fence, result.provenance["command"], fence, ""]
    return "\n".join(out)


def _longest_run(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)


def _sections(result: Profile) -> list[tuple[str, Table]]:
    sections = [("Quality", quality_table(result)), ("Speed (measured)", speed_table(result))]
    sections.append(("Memory", memory_table(result)))
    percentiles = percentile_table(result)
    if percentiles:
        sections.append(("Percentiles", percentiles))
    return [*sections, ("Provenance", facts(result))]


def _cell(text: str) -> str:
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(_cell(c) for c in row) + " |" for row in [head]] + [
        "|" + " --- |" * len(head),
        *("| " + " | ".join(_cell(c) for c in row) + " |" for row in lines),
    ]


def _status(result: Profile) -> str:
    if result.failures:
        return "Threshold missed: " + "; ".join(result.failures)
    if result.thresholds:
        return "Thresholds met: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in result.thresholds.items())
    return ""


def to_html(result: Profile) -> str:
    """One self-contained page: inline style and charts, no script, nothing fetched."""
    import jinja2

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    against = headline_scores(result).against
    bars = [(head, _parts(row.memory)) for head, row in zip(_heads(result), _rows(result), strict=True)]
    latency = [
        (css, head, row.speed[0].tpot)
        for css, head, row in zip(("packed", "base"), _heads(result), _rows(result), strict=False)
    ]
    return environment.from_string(template).render(
        title=short_name(result.model),
        verdict=verdict(result),
        status=_status(result),
        passed=result.passed,
        cards=cards(result),
        sections=_sections(result),
        formulas=result.formulas,
        command=result.provenance["command"],
        legend=_parts(result.model.memory),
        memory_chart=charts.stacked_bars(bars),
        memory_note=result.model.memory.kv_formula,
        fit=fit_words(result.model.memory),
        kld_chart=charts.log_percentiles(against.kld_percentiles, against.kld.value) if against else None,
        latency_chart=charts.histogram(latency),
        protocol=result.provenance["headline_protocol"],
        text=result.text,
        device=result.device["name"],
        version=result.provenance["qkit"],
        date=result.provenance["date"],
    )


def _parts(memory: Memory) -> list[charts.Part]:
    return [
        charts.Part("packed", "packed linears", memory.packed),
        charts.Part("embeddings", "embedding", memory.embeddings),
        charts.Part("unquantized", "not quantized", memory.unquantized),
        charts.Part("kv", "KV cache", memory.kv_cache_context),
        charts.Part("activations", "activations", memory.activations),
    ]


def summary(result: Profile) -> str:
    """What the command line prints: the headline, both protocols, where the report is."""
    width = max(len(c["title"]) for c in cards(result))
    lines = [result.model.name, "", *(f"  {c['title']:<{width}}  {c['value']:<12} {c['note']}" for c in cards(result))]
    lines += ["", *_plain_table(*quality_table(result)), "", *_plain_table(*speed_table(result)), ""]
    text = result.text
    lines.append(f"  memory  {units.size(result.model.memory.total)}, {fit_words(result.model.memory)}")
    lines.append(f"  text    {text.name}, {text.chunks} x {text.n_ctx} tokens; {text.overlap}")
    lines.append(f"  report  {Path(result.out) / NAMES[2]}")
    status = _status(result)
    return "\n".join([*lines, *([f"  {status}"] if status else [])])


def _plain_table(head: list[str], lines: list[list[str]]) -> list[str]:
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
