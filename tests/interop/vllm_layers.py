"""What runs inside vLLM's worker process: a module of its own, so that it can be sent there by name."""

from collections import Counter
from typing import Any


def layers(model: Any) -> dict[str, int]:
    """What computes the quantized linears: the kernel that qkit's plug-in chose, or the class of vLLM's method."""
    kinds: Counter[str] = Counter()
    for module in model.modules():
        if hasattr(module, "base_layer"):  # what adapts a linear: it shows the linear's own attributes
            continue
        method = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        if "Linear" in type(module).__name__ and method is not None:
            ours = getattr(module, "qkit_kernel", None)
            kinds[f"qkit {ours}" if ours else type(method).__name__] += 1
    return dict(kinds)


def cache_scales(model: Any) -> list[tuple[str, float, float]]:
    """For each attention, in order: the type of its KV cache, what keys and what values are divided by."""
    found = (module for module in model.modules() if hasattr(module, "_k_scale_float"))
    return [(module.kv_cache_dtype, module._k_scale_float, module._v_scale_float) for module in found]
