"""The catalogue of devices: profiles/devices.csv."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import QkitError

GIB = 1 << 30


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


def profile_path(name: str) -> Path:
    """Where a data file of profiles/ lies: in the installed package, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "profiles" / name
    return installed if installed.is_file() else here.parent / "profiles" / name


@cache
def catalogue() -> tuple[Device, ...]:
    """The rows of profiles/devices.csv. Raises QkitError where a row is malformed."""
    path = profile_path("devices.csv")
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


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9+]+", re.sub(r"\([^)]*\)", " ", name.lower())))


def match(name: str, memory_bytes: int | None, capability: str | None) -> str | None:
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
