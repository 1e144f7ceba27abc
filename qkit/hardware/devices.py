"""`qkit devices`: what is present here beside the catalogue."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .catalogue import GIB, Device, catalogue
from .detect import LocalDevice, present


@dataclass(frozen=True)
class Devices:
    present: tuple[LocalDevice, ...]
    catalogue: tuple[Device, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def devices() -> Devices:
    """The devices present here and the catalogue."""
    return Devices(tuple(present()), catalogue())


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
        cells = (d.memory_gib, d.bandwidth_gbs, d.bf16_tflops, d.int8_tops, d.tdp_w)
        a, b, c, e, f = ("-" if v is None else f"{v:g}" for v in cells)
        lines.append(f"  {d.id:<18} {d.name:<42} {a:>7} {b:>7} {c:>13} {e:>11} {f:>6}")
    return "\n".join(lines)
