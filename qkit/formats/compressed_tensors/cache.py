"""`kv_cache_scheme`: keys and values that a client rounds on their way into the cache, to FP8 (e4m3) with the
k_scale and v_scale of each attention module (compressed_tensors/quantization/lifecycle/initialize.py:
initialize_attn_qparams; vLLM, compressed_tensors.py: CompressedTensorsKVCacheMethod)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import QkitError

FP8 = "fp8"
_SCHEME: dict[str, Any] = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
}  # fmt: skip


def arguments() -> dict[str, Any]:
    """`kv_cache_scheme` of a config."""
    return {**_SCHEME, "group_size": None, "block_structure": None, "actorder": None, "observer": None}


def parse(given: Mapping[str, Any]) -> str | None:
    """FP8, or None for {}. Raises QkitError for what is not read."""
    if not given:
        return None
    defaults = {**_SCHEME, "type": "int"}
    for key, expected in _SCHEME.items():
        found = defaults[key] if given.get(key) is None else given[key]
        if found != expected:
            raise QkitError(
                f"a quantized KV cache with {key} {found!r} is not supported (kv_cache_scheme)",
                "supported: 8-bit floats with a scale per tensor, symmetric and not dynamic",
            )
    return FP8
