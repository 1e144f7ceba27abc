"""`qkit devices`: what is present here beside the catalogue."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from .catalogue import GIB, Device, catalogue, fast_formats
from .detect import LocalDevice, present

_COLUMNS = (
    ("memory_gib", "GiB", 6), ("usable_gib", "usable", 8), ("bandwidth_gbs", "GB/s", 8), ("fp16_tflops", "fp16", 8),
    ("int8_tops", "int8", 8), ("fp8_tflops", "fp8", 8), ("fp4_tflops", "fp4", 7), ("tdp_w", "W", 6),
)  # fmt: skip


@dataclass(frozen=True)
class Devices:
    present: tuple[LocalDevice, ...]
    catalogue: tuple[Device, ...]

    def as_dict(self) -> dict[str, Any]:
        listed = [{**asdict(device), "fast": fast_formats(device)} for device in self.catalogue]
        return {"present": [asdict(p) for p in self.present], "catalogue": listed}


def devices() -> Devices:
    """The devices present here and the catalogue."""
    return Devices(tuple(present()), catalogue())


def describe(result: Devices) -> str:
    """Both lists as text, one device a line; the catalogue by vendor, processors last."""
    lines = ["present"]
    for p in result.present:
        memory = f"{p.memory_bytes / GIB:.1f} GiB, {p.available_bytes / GIB:.1f} free"
        cores = f", {p.cores} cores" if p.cores else ""
        known = f" = {p.catalogue_id}" if p.catalogue_id else ""
        lines.append(f"  {p.id:<8} {p.name}{known}: {memory}{cores}; {' '.join(p.features)}".rstrip("; "))
    lines += [
        "",
        f"catalogue: {len(result.catalogue)} devices. Peak rates, dense, in TFLOP/s or TOP/s; fp16 with sums in fp32;",
        "usable: what an allocator gets; ?: no public source found. `qkit devices --json` says where each was read.",
    ]
    head = "".join(f"{title:>{width}}" for _, title, width in _COLUMNS)
    for group, members in groupby(sorted(result.catalogue, key=_order), key=_group):
        lines += ["", f"{group:<57}{head}".rstrip()]
        lines += [_line(device) for device in members]
    return "\n".join(lines)


def _group(device: Device) -> str:
    return "CPUs" if device.kind == "cpu" else device.vendor


def _order(device: Device) -> tuple[bool, str]:
    return device.kind == "cpu", "" if device.kind == "cpu" else device.vendor


def _line(device: Device) -> str:
    cells = ""
    for field, _, width in _COLUMNS:
        value = getattr(device, field)
        text = "-" if value is None else f"{value:.6g}" + "?" * (field in device.unverified)
        cells += f"{text:>{width}}"
    return f"  {device.id:<20} {device.name:<34}{cells}"
