"""The report's tables, as text: a header and rows, for whichever writer shows them."""

from __future__ import annotations

from typing import Any

from .. import units
from ..measure.quality import Divergence
from ..measure.types import Measured, Memory, Profile
from . import charts
from .wording import against, percent, pm, setting

Table = tuple[list[str], list[list[str]]]  # header, rows


def rows(result: Profile) -> list[Measured]:
    return [result.model] + ([result.baseline] if result.baseline else [])


def heads(result: Profile) -> list[str]:
    return ["model", "baseline"][: len(rows(result))]


def quality(result: Profile) -> Table:
    protocols = list(result.quality.protocols.values())
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
    return ["", *(s.protocol for s in protocols)], lines


def percentiles(result: Profile) -> Table | None:
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


def speed(result: Profile) -> Table:
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
    return head, lines


def facts(result: Profile) -> Table:
    """What was measured, on what, from what."""
    p, d, row = result.provenance, result.device, result.model
    lines = [["model", f"{row.name} ({row.architecture}, {row.parameters:,} parameters, {row.dtype})"]]
    if row.schemes:
        lines.append(["quantization", ", ".join(f"{n} linears {s}" for s, n in row.schemes.items())])
    if row.kernels:
        lines.append(["kernels", ", ".join(f"{n} x {k}" for k, n in row.kernels.items()) + f" ({p['kernels']})"])
    if result.baseline:
        base = result.baseline
        quantized = (
            f"; itself quantized: {units.counted(base.stored_types)}, {base.bits_per_weight:.2f} bits per weight"
        )
        lines.append(["baseline", f"{base.name} ({base.dtype}{quantized if against(result) else ''})"])
    cores = f", {d['cores']} cores, {d['threads']} threads" if d["cores"] else ""
    size = f"{units.size(row.memory.free_bytes)} free of {units.size(d['memory_bytes'])}"
    lines += [
        ["device", f"{d['name']}{cores}, {size}; {' '.join(d['features'])}"],
        ["read ceiling", f"{d['read_ceiling_gbs']:.1f} GB/s, measured"],
        ["evaluation text", f"{result.text.name}, {result.text.chunks} x {result.text.n_ctx} tokens"
         + (", BOS in place of each chunk's first token" if result.text.bos else "")],
        ["overlap with calibration", result.text.overlap],
        ["memory seen as", row.memory.seen or f"not measured: {row.memory.problem}"],
        ["versions", ", ".join(f"{k} {p[k]}" for k in ("qkit", "python", "torch", "transformers"))],
        ["system, date", f"{p['system']}, {p['date']}"],
    ]  # fmt: skip
    return ["", ""], lines


def records(result: Profile) -> Table:
    """What identifies the inputs to a machine: hashes, and the options of the conversion."""
    p = result.provenance
    known = {
        "sha256 of the text": result.text.sha256,
        "fingerprint of the model": p["model_fingerprint"],
        "fingerprint of the baseline": p["baseline_fingerprint"],
        "sha256 of the manifest": p["manifest_sha256"],
    }
    lines = [[name, value] for name, value in known.items() if value]
    lines += [[f"converted: {k}", _plain(v)] for k, v in p["conversion"].items() if v not in (None, [], {})]
    return ["", ""], lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
