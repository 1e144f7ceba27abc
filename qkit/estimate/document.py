"""An estimate as a JSON document: every figure is predicted, bytes and seconds are plain numbers, null is unknown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from ..hardware.device import Device
from .answer import Answer, Speeds
from .cache import kv
from .estimate import Estimate
from .fit import BATCHES, Fit, contexts
from .rates import fitted
from .speed import Prediction
from .steps import Step

SCHEMA_VERSION = 3

CONTEXT_WORDS = "{:,} tokens of context, batch {}, a KV cache of {}"
FORMULAS = {
    "weights": "sum over the tensors of their headers, or over the shapes of the architecture at the types of its "
    "config or of the scheme; on several devices the share of the fullest",
    "KV cache": "sum over layers of what each keeps of a token, as the engine holds it: windows, latents and states by "
    "kind, pages rounded up",
    "activations, logits, graphs, runtime": "by engine: the basis stands with each",
    "usable": "what the engine may take of the device's memory",
    "tokens per second": "roofline: weights and cache over bandwidth, operations over the dense peak, a launch a layer "
    "and pass; what engines reach of them is fitted to published figures (profiles/speed.json, "
    "benchmarks/speed_fit.py)",
    "interval": "nine in ten: the fit's uncertainty, and the spread of engines, kernels and devices where a figure is "
    "missing; held-out figures lie within as often as benchmarks/speed_fit.py says",
    "first token": "time of a pass over the prompt, one sequence",
    "dollars per million": "price per hour / (tokens per second x 3600 x utilization), at full load: as many sequences "
    "as fit, at most 256",
    "break-even": "tokens a month from which a rented target costs less than the hosted price in the same mix",
}


def document(results: Sequence[Estimate]) -> dict[str, Any]:
    """What the document of one run says of its models."""
    return {
        "schema_version": SCHEMA_VERSION,
        "estimates": [as_dict(result) for result in results],
        "formulas": FORMULAS,
    }


def as_dict(result: Estimate) -> dict[str, Any]:
    s = result.subject
    per_token = kv(s.arch, 1024, 1, result.kv_dtype or "BF16").total / 1024
    return {
        "model": {
            "name": s.label,
            "base_model": s.base_model,
            "architecture": s.arch.model_type,
            "architecture_basis": s.arch.basis,
            "parameters": s.arch.parameters,
            "active_parameters": s.arch.active_parameters,
            "layers": len(s.arch.layers),
            "max_tokens": s.arch.max_tokens,
            "stored": s.stored,
            "weights": s.weights.total,
            "weights_by_class": s.weights.by_class,
            "weights_basis": s.basis,
            "bits_per_weight": s.bits_per_weight,
            "kv_bytes_per_token": per_token,
            "kv_formula": kv(s.arch, result.context, 1, result.kv_dtype or "BF16").formula,
        },
        "context": result.context,
        "batch": result.asked.batch,
        "kv_dtype": result.kv_dtype,
        "hosted": _hosted(result),
        "answers": [
            {**_answer(a, result), "steps": [_step(s) for s in result.steps[i]] if result.steps else []}
            for i, a in enumerate(result.answers)
        ],
    }


def provenance(command: str) -> dict[str, Any]:
    from .. import __version__

    return {
        "command": command,
        "qkit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "speed_fit": fitted().source or None,
    }


def _hosted(result: Estimate) -> dict[str, Any] | None:
    money = result.money
    if not money.hosted:
        return None
    return {"usd_in": money.hosted[0], "usd_out": money.hosted[1], "source": money.hosted_source}


def _answer(a: Answer, result: Estimate) -> dict[str, Any]:
    fit, device = a.fit, a.target.device
    return {
        "device": a.target.spec,
        "name": device.name,
        "vendor": device.vendor,
        "count": a.target.count,
        "peaks": _peaks(device),
        "engine": a.engine,
        "fits": fit.fits,
        "problem": fit.problem or None,
        "memory": {
            "total": fit.memory.total,
            "parts": {t.name: t.nbytes for t in fit.memory.terms},
            "basis": {t.name: t.basis for t in fit.memory.terms},
            "usable": fit.usable,
            "usable_basis": fit.usable_words,
            "nominal": int(device.memory_gib * (1 << 30)) if device.memory_gib else None,
        },
        "largest_context": fit.largest_context(result.asked.batch),
        "largest_batch": fit.largest_batch(result.context),
        "grid": _grid(fit) if result.detailed else None,
        "speed": _speeds(a.speeds),
        "speed_unknown": a.unknown or None,
        "slow": a.slow or None,
        "costs": asdict(a.costs) if a.costs else None,
        "against": asdict(a.against) if a.against else None,
        "purchase": {**asdict(a.purchase), "source": a.purchase_source} if a.purchase else None,
    }


def _peaks(device: Device) -> dict[str, Any]:
    names = ("bandwidth_gbs", "fp16_tflops", "bf16_tflops", "int8_tops", "fp8_tflops", "fp4_tflops", "tdp_w")
    return {name: getattr(device, name) for name in names}


def _grid(fit: Fit) -> dict[str, Any]:
    rows = contexts(fit)
    return {
        "contexts": rows,
        "batches": list(BATCHES),
        "needs": [[fit.needs(context, batch) for batch in BATCHES] for context in rows],
        "fits": None if fit.usable is None else [list(row) for row in fit.grid(rows)],
    }


def _speeds(s: Speeds | None) -> dict[str, Any] | None:
    if s is None:
        return None
    return {
        "decode": _prediction(s.decode),
        "prefill": _prediction(s.prefill),
        "loaded": _prediction(s.loaded),
        "first": [asdict(f) for f in s.first],
        "instant": s.instant,
        "basis": s.decode.basis,
        "batches": [{"batch": n, **_prediction(p)} for n, p in s.batches],
        "contexts": [{"context": n, **_prediction(p)} for n, p in s.contexts],
        "roof": asdict(s.roof) if s.roof else None,
    }


def _prediction(p: Prediction) -> dict[str, Any]:
    """Without its basis, which is the same for all of a device."""
    return {name: value for name, value in asdict(p).items() if name != "basis"}


def _step(step: Step) -> Mapping[str, Any]:
    return {
        "name": step.name,
        "format": step.format,
        "scheme": step.scheme,
        "kv_dtype": step.kv_dtype,
        "engine": step.fit.engine,
        "weights": step.nbytes,
        "total": step.fit.memory.total,
        "fits": step.fit.fits,
        "largest_context": step.largest_context,
        "largest_batch": step.largest_batch,
    }
