"""The model card of a converted folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import units

if TYPE_CHECKING:
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from .plan import Plan


_LIBRARIES = {"gguf": "gguf"}


def card(plan: Plan, source: Source, manifest: Manifest) -> str:
    """The model card. Everything in it is measured while writing and repeatable: no date, no time."""
    from huggingface_hub import ModelCardData

    from .. import __version__

    library = _LIBRARIES.get(plan.options.format, "transformers")
    declared: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["qkit"]}
    declared |= source.metadata
    if "/" in source.base_model:
        declared["base_model"] = source.base_model
        if plan.kinds:
            declared["base_model_relation"] = "quantized"
    if plan.kinds:
        declared["tags"].append(plan.options.format)
    header = ModelCardData(**declared).to_yaml().splitlines()
    lines = ["---", *header, "---", "", f"# {plan.name}", ""]
    if not plan.kinds:
        lines += [f"`{source.base_model}` as plain safetensors, exported by qkit {__version__}.", ""]
    else:
        what = " + ".join(scheme.describe() for scheme in plan.kinds)
        lines += [
            f"`{source.base_model}` quantized by qkit {__version__}: {what}, method {plan.method.name}, "
            f"format {plan.options.format}.",
            "",
        ]
        if plan.kv_cache:
            scales = "from the calibration text" if plan.cache else "those of the source"
            lines += [
                "KV cache: FP8 (e4m3), half the bytes of 16 bits, with a scale for the keys and one for the values of "
                f"each layer, {scales}.",
                "",
            ]
        calibration = manifest.identity["calibration"]
        if calibration:
            lines += [
                f"Calibrated on {calibration['samples']} x {calibration['length']} tokens of {calibration['name']} "
                f"(sha256 `{calibration['sha256'][:16]}`).",
                "",
            ]
        computed = sorted({t["computed_on"] for t in manifest.tensors.values() if "computed_on" in t})
        if computed:
            lines += [
                f"Computed on {'; '.join(computed)}. The order of sums, and with it the last bits of a calibrated "
                "result, depends on that; nothing else does.",
                "",
            ]
    if source.stored.quantized:
        lines += [
            f"The source is itself quantized ({source.stored.describe()}; {units.size(source.stored.nbytes)} stored, "
            f"{units.size(plan.bytes_in)} expanded to bfloat16, each value rounded by 0.2 % at most): what it lost "
            "before is lost here too.",
            "",
        ]
    lines += _table(plan, source, manifest)
    fallbacks = [f"- `{n}`: {t['fallback']}" for n, t in sorted(manifest.tensors.items()) if t.get("fallback")]
    if fallbacks:
        lines += ["", "## Layers that fell back to rounding", "", *fallbacks]
    lines += [
        "",
        "Every file's hash, every layer's scheme and error are in `qkit_manifest.json`;",
        "`qkit inspect --verify` checks them. Perplexity, KL divergence and speed on your machine:",
        "`qkit profile THIS_FOLDER --baseline SOURCE`.",
        "",
    ]
    return "\n".join(lines)


def _table(plan: Plan, source: Source, manifest: Manifest) -> list[str]:
    rows = [
        ("weights, source as stored", units.size(source.stored.nbytes)),
        ("weights, here", units.size(plan.bytes_out)),
        ("bits per weight", f"{plan.bits_per_weight:.3f}"),
    ]
    if plan.bits_per_quantized_weight:
        rows.append(("bits per weight in quantized layers", f"{plan.bits_per_quantized_weight:.3f}"))
        rows.append(("quantized layers", str(len(plan.schemes))))
        for key, label in (("weight_error", "relative weight error"), ("output_error", "relative output error")):
            errors = sorted(t[key] for t in manifest.tensors.values() if key in t)
            if errors:
                rows.append((f"{label}, median and worst layer", f"{errors[len(errors) // 2]:.4f}, {errors[-1]:.4f}"))
    return ["| measured while converting | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)]
