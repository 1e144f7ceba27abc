"""What this machine has, and the catalogue of devices in profiles/devices.csv."""

from __future__ import annotations

import csv
import os
import platform
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import QkitError

GIB = 1 << 30

# Instruction sets that a kernel could use; whatever else a CPU has does not matter here.
_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
        "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A catalogue row: peak figures. None where the source has none.

    memory_gib in GiB, bandwidth_gbs in 10^9 bytes/s, rates dense in 10^12 operations/s, tdp_w in W.
    source says where the figures were read, and which of them are unverified.
    """

    id: str
    name: str
    vendor: str
    arch: str
    memory_gib: float | None
    bandwidth_gbs: float | None
    bf16_tflops_dense: float | None
    int8_tops_dense: float | None
    fp8_tflops_dense: float | None
    tdp_w: float | None
    compute_capability: str
    source: str


@dataclass(frozen=True)
class Present:
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


@dataclass(frozen=True)
class Devices:
    present: tuple[Present, ...]
    catalogue: tuple[Device, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def devices() -> Devices:
    """The devices present here and the catalogue."""
    return Devices(tuple(present()), catalogue())


def _catalogue_path() -> Path:
    here = Path(__file__).resolve().parents[1]
    installed = here / "profiles" / "devices.csv"
    return installed if installed.is_file() else here.parent / "profiles" / "devices.csv"  # in a checkout


@cache
def catalogue() -> tuple[Device, ...]:
    """The rows of profiles/devices.csv. Raises QkitError where a row is malformed."""
    path = _catalogue_path()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(_device(row, line) for line, row in enumerate(csv.DictReader(file), 2))
    except OSError as error:
        raise QkitError(f"the device catalogue {path} cannot be read: {error.strerror}", "reinstall qkit") from None


def _device(row: dict[str, str], line: int) -> Device:
    numbers = ("memory_gib", "bandwidth_gbs", "bf16_tflops_dense", "int8_tops_dense", "fp8_tflops_dense", "tdp_w")
    try:
        if None in row or None in row.values():
            raise ValueError("not as many cells as the header has")
        values: dict[str, Any] = {k: (float(v) if v else None) if k in numbers else v for k, v in row.items()}
        return Device(**values)
    except (TypeError, ValueError) as error:
        raise QkitError(f"profiles/devices.csv, line {line}: {error}") from None


def present() -> list[Present]:
    """The devices of this machine, probed, nothing measured: CUDA devices that torch sees, then the CPU."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        match = _match(properties.name, total, capability)
        features = (f"compute capability {capability}",)
        found.append(Present(f"cuda:{index}", properties.name, total, free, None, features, match))
    return [*found, cpu()]


def cpu() -> Present:
    """This machine's CPU: model, cores this process may use, instruction sets, memory."""
    name, flags = _cpuinfo()
    total, available = _memory()
    features = tuple(f for f in _ISA if f in flags)
    return Present("cpu", name, total, available, cores(), features, _match(name, None, None))


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """(total, available) bytes; a container's limit counts where it is below the machine's memory."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, max(0, total - used))
    return total, available


def _cpuinfo() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(re.findall(r"^([^\n:]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), flags


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9+]+", re.sub(r"\([^)]*\)", " ", name.lower())))


def _match(name: str, memory_bytes: int | None, capability: str | None) -> str | None:
    """The catalogue row whose model words all stand in the probed name; of several, the one nearest in memory."""
    noise = {"nvidia", "geforce", "amd", "intel", "apple", "instinct", "radeon"}
    probed = _words(re.sub(r"(\d)\s*gb\b", r"\1gb", name, flags=re.IGNORECASE))
    fits = []
    for device in catalogue():
        words = {w for w in _words(device.name) - noise if not re.fullmatch(r"\d+gb|\d+-?core|(sxm|pcie)\d*", w)}
        if not words or not words <= probed or (capability and device.compute_capability not in ("", capability)):
            continue
        if ("PCIe" in device.name and "pcie" not in probed) or ("SXM" in device.name and "pcie" in probed):
            continue
        if memory_bytes is None:
            fits.append((0.0, device.id))
        elif device.memory_gib and abs(memory_bytes / GIB / device.memory_gib - 1) < 0.1:
            fits.append((abs(memory_bytes / GIB / device.memory_gib - 1), device.id))
    return min(fits)[1] if fits else None


def choose(name: str) -> Present:
    """The present device that `name` ("auto", "cpu", "cuda", "cuda:1") means.

    Raises QkitError, listing those present, for one that is not here or is only in the catalogue.
    """
    here = present()
    wanted = here[0].id if name == "auto" else "cuda:0" if name == "cuda" else name
    for device in here:
        if device.id == wanted or (device.catalogue_id and device.catalogue_id == wanted):
            return device
    hint = "present: " + ", ".join(f"{d.id} ({d.name})" for d in here)
    if any(d.id == wanted for d in catalogue()):
        raise QkitError(f"{wanted} is in the catalogue but not in this machine, and qkit cannot predict yet", hint)
    raise QkitError(f"no device {name!r}", hint + "; `qkit devices` lists the catalogue")


def describe(result: Devices) -> str:
    """Both lists as text, one device a line."""
    lines = ["present"]
    for p in result.present:
        memory = f"{p.memory_bytes / GIB:.1f} GiB, {p.available_bytes / GIB:.1f} free"
        cores = f", {p.cores} cores" if p.cores else ""
        known = f" = {p.catalogue_id}" if p.catalogue_id else ""
        lines.append(f"  {p.id:<8} {p.name}{known}: {memory}{cores}; {' '.join(p.features)}".rstrip("; "))
    lines += ["", "catalogue (peak figures, dense; `qkit devices --json` says where each was read)"]
    lines.append(f"  {'id':<18} {'name':<42} {'GiB':>7} {'GB/s':>7} {'bf16 TFLOP/s':>13} {'int8 TOP/s':>11} {'W':>6}")
    for d in result.catalogue:
        cells = (d.memory_gib, d.bandwidth_gbs, d.bf16_tflops_dense, d.int8_tops_dense, d.tdp_w)
        a, b, c, e, f = ("-" if v is None else f"{v:g}" for v in cells)
        lines.append(f"  {d.id:<18} {d.name:<42} {a:>7} {b:>7} {c:>13} {e:>11} {f:>6}")
    return "\n".join(lines)
