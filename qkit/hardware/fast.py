"""Which formats have kernels on a device that gain speed, not memory alone, and whose kernels they are.

NVIDIA, Intel and x86: vLLM's documentation (features/quantization: supported hardware, fp8, int8). AMD: the same, and
what vLLM's platforms/rocm.py takes for FP8. GGUF: the back ends of llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .device import Device

if TYPE_CHECKING:
    from ..spec import LayerSpec

_GGUF = {"NVIDIA": "CUDA", "AMD": "HIP", "Apple": "Metal", "Intel": "SYCL"}


def fast_formats(device: Device) -> dict[str, str]:
    """Kind of scheme -> why it is fast there; what is missing is slow, emulated or not there.

    Kinds: w4a16, w8a16 (integer weights); w8a8 (int8); fp8 (weights and activations), fp8a16 (weights alone); nvfp4
    (weights and activations), nvfp4a16, mxfp4a16; mxfp4 (weights and activations); bnb (NF4, FP4, LLM.int8); gguf.
    """
    found = _of(device)
    backend = "CPU" if device.kind == "cpu" else _GGUF.get(device.vendor)
    if backend and not device.arch.startswith("Gaudi"):
        found["gguf"] = f"llama.cpp, {backend}"
    return found


def kinds_of(spec: LayerSpec) -> tuple[str, ...]:
    """The kinds of scheme, as in `fast_formats`, whose kernels multiply with weights stored so; none where no list
    speaks of them (2 and 3 bits)."""
    if spec.kind == "int":
        name = f"w{spec.bits}a{16 if spec.input is None else 8}"
        return (name,) if name in ("w4a16", "w8a16", "w8a8") else ()
    if spec.kind == "ggml":
        return ("gguf",)
    return (spec.kind, f"{spec.kind}a16") if spec.kind in ("fp8", "nvfp4", "mxfp4") else ("bnb",)


def _of(device: Device) -> dict[str, str]:
    if device.kind == "cpu":
        return _cpu(device)
    if device.compute_capability:
        return _nvidia(device.compute_capability)
    if device.vendor == "AMD":
        return _amd(device.capability)
    return _intel(device.arch) if device.vendor == "Intel" else {}


def _nvidia(capability: tuple[int, int]) -> dict[str, str]:
    found: dict[str, str] = {}
    at = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (7, 5):
        marlin = f"Marlin, {at} (7.5 and later)"
        found.update(w4a16=marlin, w8a16=marlin, fp8a16=marlin, nvfp4a16=marlin)
    if capability >= (8, 0):
        found["mxfp4a16"] = f"Marlin, {at} (8.0 and later)"
    if (7, 5) <= capability < (10, 0):
        found["w8a8"] = f"CUTLASS, {at} (7.5 to 9.0; vLLM has none for 10.0 and later)"
    if capability >= (8, 9):
        found["fp8"] = f"CUTLASS, {at} (8.9 and later)"
    if capability >= (10, 0):
        found["nvfp4"] = f"FP4 tensor cores, {at} (10.0 and later)"
    if capability >= (6, 0):
        found["bnb"] = f"bitsandbytes, {at} (6.0 and later)"
    return found


def _amd(gfx: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if gfx.startswith(("gfx94", "gfx95", "gfx12")):
        found["fp8"] = f"vLLM on ROCm, {gfx} (gfx94x, gfx95x, gfx12x)"
    if gfx.startswith("gfx95"):
        found["mxfp4"] = f"FP4 matrix cores, {gfx}, as AMD Quark stores it"
    return found


def _intel(arch: str) -> dict[str, str]:
    if arch.startswith("Gaudi"):
        return {"fp8": "vLLM's Gaudi plugin"}
    return {"w4a16": "vLLM on Intel GPUs (AWQ, GPTQ)"}


def _cpu(device: Device) -> dict[str, str]:
    ours = "qkit's kernels, byte dot products"
    found = dict.fromkeys(("w4a16", "w8a16", "nvfp4a16", "mxfp4a16", "bnb"), ours)
    if device.capability.startswith("x86"):
        found["w8a8"] = "qkit's kernels; vLLM on x86"
    return found
