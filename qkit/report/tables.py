"""The report's tables, as text: a header and rows, for whichever writer shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import units
from ..measure.quality import Divergence, Scores
from ..measure.types import Measured, Memory, Profile
from . import charts, wording
from .wording import against, percent, pm, setting

Table = tuple[list[str], list[list[str]]]  # header, rows


def rows(result: Profile) -> list[Measured]:
    return [*result.models, *([result.baseline] if result.baseline else [])]


def heads(result: Profile) -> list[str]:
    """What each row is called: "model" where there is one, else the names."""
    named = [result.models[0].name] if len(result.models) == 1 else wording.names(result)
    ours = ["model"] if len(named) == 1 else named
    return [*ours, *(["baseline"] if result.baseline else [])]


def candidates(result: Profile) -> Table:
    """Several models side by side: size, distance to the baseline, speed; last the baseline, and what failed."""
    columns: dict[str, Callable[[Measured], str]] = {
        "on disk": lambda row: units.size(row.stored_bytes),
        "bits per weight": lambda row: f"{row.bits_per_weight:.2f}",
    }
    if result.baseline:
        columns["mean KL divergence"] = lambda row: _distance(result, row, lambda d: pm(d.kld))
        columns["top-1 agreement"] = lambda row: _distance(
            result, row, lambda d: f"{percent(d.same_top.value)} ± {percent(d.same_top.error)}"
        )
    columns["perplexity"] = lambda row: pm(s.perplexity) if (s := wording.headline(result, row)) else "-"
    columns["generate tok/s"] = lambda row: f"{row.speed[0].generate_tps:,.1f}" if row.speed else "-"
    if result.baseline:
        columns["x the baseline's"] = lambda row: "-" if row.faster is None else f"{row.faster:.2f}"
    columns["memory"] = lambda row: _size(row.memory.total)
    if result.baseline:
        columns["frontier"] = lambda row: {True: "yes", False: "no", None: "-"}[row.on_frontier]
    named = zip(heads(result), rows(result), strict=True)
    lines = [[name, *(cell(row) for cell in columns.values())] for name, row in named]
    lines += [[wording.short(each.name), "failed", *[""] * (len(columns) - 1)] for each in result.failed]
    return ["", *columns], lines


def _distance(result: Profile, row: Measured, shown: Callable[[Divergence], str]) -> str:
    scores = wording.headline(result, row)
    return shown(scores.against) if scores and scores.against else "-"


def quality(result: Profile) -> Table | None:
    """A column for each model and protocol; None where nothing was scored."""
    columns: list[tuple[str, Scores]] = []
    for name, row in zip(heads(result), result.models, strict=False):
        for scores in row.quality.protocols.values() if row.quality else ():
            columns.append((scores.protocol if len(result.models) == 1 else f"{name}, {scores.protocol}", scores))
    if not columns:
        return None
    protocols = [scores for _, scores in columns]
    lines: list[list[str]] = [["scored tokens", *(f"{s.tokens:,}" for s in protocols)]]
    lines.append(["perplexity", *(pm(s.perplexity) for s in protocols)])
    known = [s.against for s in protocols if s.against]
    if known:
        base = result.baseline
        kind = ", itself quantized" if base and base.quantized_as else ""
        other = " to the quantized baseline" if kind else ""
        lines += [
            [f"baseline perplexity{kind}", *(pm(a.perplexity) for a in known)],
            ["ln(PPL / baseline PPL)", *(pm(a.ln_ratio) for a in known)],
            ["correlation of ln p", *("-" if a.correlation is None else percent(a.correlation) for a in known)],
            [f"mean KL divergence{other}", *(pm(a.kld) for a in known)],
            [
                "top-1 agreement" + (" with it" if kind else ""),
                *(f"{percent(a.same_top.value)} ± {percent(a.same_top.error)}" for a in known),
            ],
            ["mean Δp", *(f"{percent(a.delta_p.value)} ± {percent(a.delta_p.error)}" for a in known)],
            ["RMS Δp", *(f"{percent(a.delta_p_rms.value)} ± {percent(a.delta_p_rms.error)}" for a in known)],
        ]
    names = [name for name, _ in columns]
    if len(result.models) == 1:
        return ["", *names], lines
    # Of several models, a row for each: there are more of them than figures.
    turned = zip(names, *(line[1:] for line in lines), strict=True)
    return ["", *(line[0] for line in lines)], [list(row) for row in turned]


def percentiles(row: Measured) -> Table | None:
    """Of one model."""
    protocols = [s for s in row.quality.protocols.values() if s.against] if row.quality else []
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


def memory(result: Profile) -> Table:
    """What was measured and what a formula says, each in columns of its own."""
    each = rows(result)

    def measured(name: str, attribute: str) -> list[str]:
        return [name, *(cell for r in each for cell in (_size(getattr(r.memory, attribute)), ""))]

    def both(name: str, attribute: str) -> list[str]:
        return [
            name,
            *(_size(getattr(part, attribute)) for r in each for part in (r.memory, r.formula)),
        ]

    first = each[0]
    lines = [
        both("weights", "weights"),
        measured("· packed linears", "packed"),
        measured("· embedding and tied head", "embeddings"),
        measured("· not quantized", "unquantized"),
        both(f"KV cache at {setting(first.memory)} (--context)", "kv_cache"),
        measured("activations and scratch, at the peak", "activations"),
        measured("the process: Python, torch, libraries", "process"),
        measured("total, at the peak", "total"),
    ]
    if result.device["id"] != "cpu":
        lines.append(measured("in the machine's RAM beside it", "host"))
    lines += [_most(result), measured("free before loading", "free_bytes"), measured("the device's", "device_bytes")]
    lines.append(["total of free", *(cell for r in each for cell in (_share(r.memory), ""))])
    lines.append(["stored on disk", *(cell for r in each for cell in (units.size(r.stored_bytes), ""))])
    lines.append(["bits per weight", *(cell for r in each for cell in (f"{r.bits_per_weight:.3f}", ""))])
    return ["", *(f"{h}, {how}" for h in heads(result) for how in ("measured", "by formula"))], lines


def _most(result: Profile) -> list[str]:
    """The KV cache at the most the model takes; the two models of a comparison take the same, or the row says both."""
    each = rows(result)
    known = list(dict.fromkeys(f"{r.formula.max_tokens:,}" for r in each if r.formula.max_tokens))
    tokens = " / ".join(known) or "unknown"
    name = f"KV cache at {tokens} tokens x batch {each[0].memory.batch} (the model's own maximum)"
    return [name, *(cell for r in each for cell in ("", _size(r.formula.kv_cache_max)))]


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else units.size(nbytes)


def _share(used: Memory) -> str:
    if used.total is None:
        return "-"
    return f"{used.total / max(1, used.free_bytes):.1%}, {'fits' if used.fits else 'does NOT fit'}"


def speed(result: Profile) -> Table | None:
    """None where nothing was timed."""
    head = ["", "batch", "prompt", "generate tok/s", "with prompt tok/s", "bare step tok/s", "TTFT", "TPOT p50"]
    head += ["TPOT p99", "prefill tok/s", "read GB/s", "of ceiling"]
    lines = []
    for name, row in zip(heads(result), rows(result), strict=True):
        for s in row.speed:
            lines.append([
                name, str(s.batch), f"{s.prompt:,}", f"{s.generate_tps:,.1f}", f"{s.generate_call_tps:,.1f}",
                f"{s.decode_tps:,.1f}", f"{s.ttft_median * 1e3:,.1f} ms", f"{s.tpot_p50 * 1e3:.2f} ms",
                f"{s.tpot_p99 * 1e3:.2f} ms", f"{s.prefill_tps:,.0f}",
                "-" if s.read_gbs is None else f"{s.read_gbs:.1f}",
                "-" if s.read_share is None else f"{s.read_share:.0%}",
            ])  # fmt: skip
    return (head, lines) if lines else None


def overlap(result: Profile) -> str:
    """Of the evaluation text and the models' calibration texts; said once where it is the same."""
    each = [row.overlap for row in result.models]
    if len({*each}) == 1:
        return each[0]
    return ". ".join(f"{name}: {words}" for name, words in zip(heads(result), each, strict=False))


def facts(result: Profile) -> Table:
    """What was measured, on what, from what."""
    p, d = result.provenance, result.device
    lines = []
    for name, row in zip(heads(result), rows(result), strict=True):
        what = f"{row.name} ({row.architecture}, {row.parameters:,} parameters, {row.dtype})"
        if row is result.baseline:
            quantized = (
                f"; itself quantized: {units.counted(row.stored_types)}, {row.bits_per_weight:.2f} bits per weight"
            )
            what = f"{row.name} ({row.dtype}{quantized if against(result) else ''})"
        of = f"{name}: " if len(result.models) > 1 or row is result.baseline else ""
        lines.append([name, what])
        if row is not result.baseline:
            if row.schemes:
                lines.append([f"{of}quantization", ", ".join(f"{n} linears {s}" for s, n in row.schemes.items())])
            if row.kernels:
                kernels = ", ".join(f"{n} x {k}" for k, n in row.kernels.items())
                lines.append([f"{of}kernels", f"{kernels} ({p['kernels']})"])
            lines.append([f"{of}overlap with calibration", row.overlap])
        lines += [[f"{of}failed", problem] for problem in row.problems]
    first = result.models[0]
    cores = f", {d['cores']} cores, {d['threads']} threads" if d["cores"] else ""
    size = f"{units.size(first.memory.free_bytes)} free of {units.size(d['memory_bytes'])}"
    seen = next((row.memory.seen for row in result.models if row.memory.seen), None)
    lines += [
        ["device", f"{d['name']}{cores}, {size}; {' '.join(d['features'])}"],
        ["read ceiling", f"{d['read_ceiling_gbs']:.1f} GB/s, measured"],
        ["evaluation text", f"{result.text.name}, {result.text.chunks} x {result.text.n_ctx} tokens"
         + (", BOS in place of each chunk's first token" if result.text.bos else "")],
        ["memory seen as", seen or f"not measured: {first.memory.problem}"],
        ["how", how(result)],
        ["versions", ", ".join(f"{k} {p[k]}" for k in ("qkit", "python", "torch", "transformers"))],
        ["system, date", f"{p['system']}, {p['date']}"],
    ]  # fmt: skip
    return ["", ""], lines


def how(result: Profile) -> str:
    """Whether models were loaded or ran block by block, and how runs were timed; said once where it is the same."""
    each = [
        f"speed {row.speed_how}; quality {row.quality.how if row.quality else 'not measured'}" for row in result.models
    ]
    if len(set(each)) == 1:
        return each[0]
    return ". ".join(f"{name}: {words}" for name, words in zip(heads(result), each, strict=False))


def records(result: Profile) -> Table:
    """What identifies the inputs to a machine: hashes, and the options of the conversions."""
    lines = [["sha256 of the text", result.text.sha256]]
    for name, row in zip(heads(result), rows(result), strict=True):
        lines.append(
            [
                f"fingerprint of the {name}" if name in ("model", "baseline") else f"fingerprint of {name}",
                row.fingerprint,
            ]
        )
        of = f"{name}: " if name != "model" else ""
        if row.manifest_sha256:
            lines.append([f"{of}sha256 of the manifest", row.manifest_sha256])
        lines += [[f"{of}converted: {k}", _plain(v)] for k, v in row.conversion.items() if v not in (None, [], {})]
    return ["", ""], lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
