"""A plan and a result as text."""

from __future__ import annotations

from collections import Counter

from .. import units
from .plan import Plan
from .run import ConvertResult


def describe(plan: Plan) -> str:
    """The plan as text, a line per kind of tensor and per group of equal tensors."""
    lines = [f"source   {plan.source}", f"output   {plan.out} ({plan.options.format})"]
    what = " + ".join(scheme.describe() for scheme in plan.kinds)
    lines.append(f"scheme   {what}, method {plan.method.name}" if what else "scheme   unquantized export")
    if plan.kv_cache:
        how = "calibrated" if plan.cache else "as in the source"
        lines.append(f"KV cache {plan.kv_cache} (e4m3), 8 bits a value for 16: half the bytes; scales {how}")
    lines += [f"         {note}" for note in plan.notes]
    lines.append("")
    for t in plan.tasks:
        shape = " x ".join(map(str, (*((len(t.sources),) if len(t.sources) > 1 else ()), *t.meta.shape)))
        lines.append(f"  {t.name:<56} {t.meta.dtype:>4} {shape:>15}  {t.scheme.describe() if t.scheme else t.reason}")
    lines.append("")
    counts = Counter(t.scheme.describe() if t.scheme else f"kept: {t.reason}" for t in plan.tasks)
    lines += [f"{n:6d} tensors  {kind}" for kind, n in counts.most_common()]
    lines.append("")
    per_quantized = plan.bits_per_quantized_weight
    lines.append(
        f"size     {plan.sizes} in {len(plan.shards)} file(s), "
        f"{plan.bits_per_weight:.2f} bits per weight"
        + (f" ({per_quantized:.2f} in the quantized layers)" if per_quantized else "")
    )
    free = "in the bucket" if plan.disk_free is None else f"{units.size(plan.disk_free)} free"
    lines.append(f"disk     {units.size(plan.disk_needed)} needed, {free}")
    lines.append(
        f"predicted: peak memory {units.size(plan.predicted.peak)}, time {units.duration(plan.predicted.seconds)}"
        + (", and what the network takes" if plan.over_network else "")
        + (f"; {units.size(plan.predicted.on_device)} on {plan.device}" if plan.predicted.on_device else "")
    )
    return "\n".join(lines)


def summary(result: ConvertResult) -> str:
    """The last words of a conversion."""
    plan = result.plan
    lines = [f"{result.out}: {plan.sizes}, {plan.bits_per_weight:.2f} bits per weight"]
    if result.already_done:
        lines.append("already converted with the same source, options and version: nothing to do")
    elif result.seconds is not None:
        peak = f", peak memory {units.size(result.peak_memory)}" if result.peak_memory else ""
        lines.append(f"took {units.duration(result.seconds)}{peak} (measured)")
    if result.fallbacks:
        lines.append(f"WARNING: {len(result.fallbacks)} layer(s) fell back to rounding:")
        lines += [f"  {f}" for f in result.fallbacks]
    return "\n".join(lines)
