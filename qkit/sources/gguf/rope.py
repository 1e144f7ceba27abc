"""RoPE of a GGUF file as config keys: metadata, and the `rope_freqs` tensor turned back into Llama 3's scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...errors import QkitError
from .config import Arch, Keys

_THETA = 10000.0  # llama.cpp's default, and Gemma 3's for its sliding-window layers
_TOLERANCE = 1e-5  # float32 factors, computed by other code in another order


def rope_config(keys: Keys, arch: Arch, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    """rope_theta, rope_scaling and, for Gemma 3, rope_local_base_freq.

    factors  the rope_freqs tensor [head_dim / 2], what each inverse frequency is divided by; None without one
    Raises QkitError for a scaling that transformers has no form for.
    """
    theta = keys.get("rope.freq_base", float, _THETA)
    if not theta > 0 or math.isinf(theta):
        raise QkitError(f"{keys.path}: metadata {keys.arch}.rope.freq_base is {theta}")
    config: dict[str, Any] = {"rope_theta": theta, "rope_scaling": _scaling(keys)}
    if arch.gemma:
        config["rope_local_base_freq"] = keys.get("rope.freq_base_swa", float, _THETA)
    if factors is not None and any(abs(f - 1) > _TOLERANCE for f in factors):
        if config["rope_scaling"] is not None:
            raise QkitError(f"{keys.path}: rope_freqs together with rope.scaling metadata is not supported")
        config["rope_scaling"] = _llama3(keys, theta, head_dim, factors)
    return config


def _scaling(keys: Keys) -> dict[str, Any] | None:
    """`rope.scaling.*` as transformers' rope_scaling, or None."""
    kind = keys.get("rope.scaling.type", str)
    factor = keys.get("rope.scaling.factor", float)
    legacy = keys.get("rope.scale_linear", float)
    if kind is None and (factor or legacy):
        kind = "linear"
    factor = factor or legacy or 1.0
    if not 0 < factor < math.inf:
        raise QkitError(f"{keys.path}: metadata {keys.arch}.rope.scaling.factor is {factor}")
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise QkitError(f"{keys.path}: RoPE scaling of the type {kind!r} is not supported", "supported: linear, yarn")
    config: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.need("rope.scaling.original_context_length"),
    }
    for gguf, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = keys.get(f"rope.scaling.{gguf}", float)
        if value is not None:
            config[name] = value
    attention = keys.get("rope.scaling.attn_factor", float, 1.0)
    if attention != 1.0:
        # llama.cpp multiplies its own 0.1 ln(factor) + 1 by it; transformers' factor is the product.
        config["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return config


def llama3_factors(base: float, dim: int, scaling: dict[str, Any]) -> list[float]:
    """What Llama 3's scaling divides each inverse frequency by (`_compute_llama3_parameters` of transformers)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    result = []
    for i in range(0, dim, 2):
        turns = context * base ** (-i / dim) / (2 * math.pi)  # over the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        result.append(1 / ((1 - smooth) / factor + smooth))
    return result


def _llama3(keys: Keys, theta: float, dim: int, factors: Sequence[float]) -> dict[str, Any]:
    """The parameters that give these factors, checked by computing them again; QkitError where none do.

    low and high frequency factor and context are fixed only up to a common multiple: low is 1, as published.
    """
    if len(factors) != dim // 2:
        raise QkitError(f"{keys.path}: rope_freqs has {len(factors)} values, not {dim // 2}")
    # The published parameters are short decimals; the check below would notice one that is not.
    largest = float(f"{max(factors):.5g}")
    context = keys.get("rope.scaling.original_context_length", int, 8192)
    candidates = [(4.0, context), (4.0, 8192)]
    # In between, 1/factor is linear in the number of turns: two points give the two unknowns.
    middle = [
        (theta ** (-2 * i / dim) / (2 * math.pi), (1 / f - 1 / largest) / (1 - 1 / largest))
        for i, f in enumerate(factors)
        if largest > 1 and 1 + _TOLERANCE < f < largest * (1 - _TOLERANCE)
    ]
    if len(middle) >= 2:
        (x0, y0), (x1, y1) = middle[0], middle[-1]
        slope = (y1 - y0) / (x1 - x0)
        intercept = y0 - slope * x0
        if intercept < 0:
            high = 1 - 1 / intercept
            candidates.append((float(f"{high:.4g}"), round(slope * (high - 1))))
    for high, original in candidates:
        scaling = {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        again = llama3_factors(theta, dim, scaling)
        if all(abs(a - f) <= _TOLERANCE * abs(f) * 10 for a, f in zip(again, factors, strict=True)):
            return scaling
    raise QkitError(f"{keys.path}: the rope_freqs tensor is not a Llama 3 scaling; others are not supported")
