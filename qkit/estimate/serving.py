"""How an engine is run, as far as memory depends on it, and what it may use of a device.

Defaults: vLLM 0.33, engine/arg_utils.py (get_batch_defaults) and config/cache.py; llama.cpp, common/common.h (n_ubatch,
fit_params_target).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import QkitError
from ..hardware.device import GIB, Device, Target

ENGINES = ("vllm", "llama.cpp", "transformers", "qkit")
UTILIZATION = 0.92
_LLAMA_MARGIN = GIB  # llama.cpp leaves so much of a device free when it chooses what to put there
# What vLLM's installation guide lists (docs/getting_started/installation/gpu, 0.31).
_CUDA = (7, 5)
_ROCM = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
_TORCH_SHARE = 0.95  # torch's allocator cannot use every gap between tensors


@dataclass(frozen=True)
class Serving:
    """batched_tokens  that vLLM puts into one step at most; sequences: that it runs at once. None: the device's default
    utilization     the part of a device's memory that vLLM takes
    ubatch          tokens of llama.cpp's physical batch; flash_attention: without it scores of all keys are kept
    sampler_bytes   that vLLM's sampler holds for each sequence and token of the vocabulary: logits in 16 and 32 bits,
                    probabilities, random numbers. Before 0.16 it sorted: about 39
    graphs          whether CUDA graphs are captured, and counted (vLLM counts them since 0.21)
    """

    batched_tokens: int | None = None
    sequences: int | None = None
    utilization: float = UTILIZATION
    ubatch: int = 512
    flash_attention: bool = True
    sampler_bytes: int = 18
    graphs: bool = True


def check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise QkitError(f"unknown engine {engine!r}", "known: " + ", ".join(ENGINES))


def batch_defaults(device: Device, devices: int = 1) -> tuple[int, int]:
    """(tokens of a step, sequences) of vLLM's server on a device. A100 and GB10 have the memory of the next tier, and
    are kept out of it."""
    if device.kind == "cpu":
        return 2048 * devices, 128 * devices
    gib = (device.memory_bytes or 0) / GIB
    small = re.search(r"a100|gb10", f"{device.id} {device.name}", re.IGNORECASE) is not None
    if gib >= 160:
        return 16384, 1024
    return (8192, 1024) if gib >= 70 and not small else (2048, 256)


def usable(target: Target, engine: str, serving: Serving | None = None) -> tuple[int | None, str]:
    """(bytes that an engine may use of each device; None where its memory is not known, in words)."""
    check_engine(engine)
    total = target.device.memory_bytes
    if total is None:
        return None, "the memory of the device is not known"
    s = serving or Serving()
    if engine == "vllm":
        return int(total * s.utilization), f"{s.utilization:g} of {total:,} bytes (--gpu-memory-utilization)"
    if target.device.kind == "cpu":
        return int(total * _TORCH_SHARE), f"{_TORCH_SHARE:.0%} of RAM: the rest is the system's (assumed)"
    if target.device.vendor == "Apple":
        return total, "Metal's recommended working set"
    if engine == "llama.cpp":
        margin = min(_LLAMA_MARGIN, total // 10)
        return total - margin, f"{total:,} bytes less a margin of {margin:,}"
    return int(total * _TORCH_SHARE), f"{_TORCH_SHARE:.0%} of {total:,} bytes: torch's allocator leaves gaps (assumed)"


def problem(target: Target, engine: str, heads: int) -> str:
    """Why an engine does not run on a device at all; "" where it does."""
    device = target.device
    if engine == "vllm":
        if device.vendor == "Apple":
            return "vLLM does not run on Apple's GPUs"
        if device.vendor == "AMD" and device.kind != "cpu" and device.capability not in _ROCM:
            return f"vLLM's ROCm build does not list {device.capability}"
        capability = device.compute_capability
        if capability is not None and capability < _CUDA:
            return f"vLLM needs compute capability 7.5, and this has {device.capability}"
        if heads and heads % target.count:
            return f"vLLM cannot divide {heads} attention heads by {target.count}"
    if engine == "llama.cpp" and device.arch.startswith("Gaudi"):
        return "llama.cpp has no back end for Gaudi"
    if engine == "qkit" and target.count > 1:
        return "qkit runs a model on one device"
    if engine == "qkit" and device.kind != "cpu" and device.vendor not in ("NVIDIA", ""):
        return "qkit's kernels are for CPUs and NVIDIA GPUs"
    return ""
