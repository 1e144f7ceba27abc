"""What this machine has, and which of it a command computes on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import QkitError
from . import memory
from .catalogue import GIB, catalogue, match
from .device import Device, Target

# Instruction sets that a kernel could use; whatever else a CPU has does not matter here.
_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
        "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip


@dataclass(frozen=True)
class LocalDevice:
    """A device of this machine, as probed.

    id                 what --device takes: "cpu", "cuda:0"
    memory_bytes       what processes can use at most (on the CPU: RAM, or the container's limit)
    available_bytes    of that, free now
    cores              CPU cores this process may run on; None for a GPU
    features           instruction sets (CPU) or "compute capability 9.0"
    catalogue_id       the catalogue's row for it, where the name and the memory fit one
    """

    id: str
    name: str
    memory_bytes: int
    available_bytes: int
    cores: int | None
    features: tuple[str, ...]
    catalogue_id: str | None

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"."""
        return self.id.partition(":")[0]

    @property
    def device_class(self) -> str:
        """ "cpu" or "gpu", as the catalogue has it."""
        return "cpu" if self.kind == "cpu" else "gpu"


def present() -> list[LocalDevice]:
    """The devices of this machine, probed, nothing measured: CUDA devices that torch sees, then the CPU."""
    return [*map(_cuda, range(_cuda_devices())), cpu()]


def resolve(name: str) -> LocalDevice:
    """The device of this machine that --device means: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", or
    the catalogue's id of one that is here.

    Raises QkitError, naming those present, for any other.
    """
    wanted = name.strip().lower()
    if wanted == "cpu":
        return cpu()  # without a look at the GPUs, which takes memory on each
    gpus = _cuda_devices()
    if wanted == "auto":
        return _cuda(0) if gpus else cpu()
    index = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if index and int(index[1] or 0) < gpus:
        return _cuda(int(index[1] or 0))
    here = present()
    for device in here:
        if device.catalogue_id == wanted:
            return device
    hint = "present: " + ", ".join(f"{d.id} ({d.name})" for d in here)
    if any(d.id == wanted for d in catalogue()):
        raise QkitError(f"{wanted} is in the catalogue but not in this machine", hint)
    raise QkitError(f"there is no device {name!r} here", hint)


def is_present(catalogue_id: str) -> bool:
    """Whether a device of the catalogue is in this machine. Without a GPU's driver torch is not asked, which takes
    seconds to import."""
    if cpu().catalogue_id == catalogue_id:
        return True
    return _has_driver() and any(device.catalogue_id == catalogue_id for device in present())


def _has_driver() -> bool:
    return platform.system() != "Linux" or any(
        Path(p).exists() for p in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
    )


def local_target(device: LocalDevice, read_gbs: float | None = None) -> Target:
    """A device of this machine as predictions take it: what was probed of it, and the catalogue's figures where that
    has the device. read_gbs: the bandwidth that was measured, which counts for more than a nominal one."""
    gib = device.memory_bytes / GIB
    known = next((d for d in catalogue() if d.id == device.catalogue_id), None)
    if known is None:
        known = Device(
            id=device.id, name=device.name, vendor="", arch="", kind=device.device_class,
            aliases=(), memory_gib=gib, usable_gib=gib, bandwidth_gbs=None,
            capability="x86" if platform.machine().lower() in ("x86_64", "amd64") else "arm",
        )  # fmt: skip
    bandwidth = read_gbs if read_gbs is not None and device.kind == "cpu" else known.bandwidth_gbs
    return Target(replace(known, memory_gib=gib, usable_gib=device.available_bytes / GIB, bandwidth_gbs=bandwidth))


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda(index: int) -> LocalDevice:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    known = match(properties.name, total, capability)
    features = (f"compute capability {capability}",)
    return LocalDevice(f"cuda:{index}", properties.name, total, free, None, features, known)


def cpu() -> LocalDevice:
    """This machine's CPU: model, cores this process may use, instruction sets, memory."""
    name, flags = _cpuinfo()
    total, free = memory.available()
    features = tuple(f for f in _ISA if f in flags)
    return LocalDevice("cpu", name, total, free, cores(), features, match(name, None, None))


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(re.findall(r"^([^\n:]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), flags
