"""What is known of a device, and of several of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GIB = 1 << 30
FIGURES = (
    "memory_gib", "usable_gib", "bandwidth_gbs", "fp32_tflops", "fp16_tflops", "bf16_tflops", "int8_tops",
    "fp8_tflops", "fp4_tflops", "tdp_w", "link_gbs",
)  # fmt: skip

_GIVEN = "given by the user"
# The part of memory that is usable where nobody has reported it: what drivers of cards leave; a system and its programs
# keep a tenth of memory that they share with a GPU. What the system of a CPU keeps is its owner's affair.
_USABLE = {"gpu": 0.97, "unified": 0.9, "cpu": 1.0}


@dataclass(frozen=True)
class Price:
    """What one device cost: `usd_per_hour` to rent, or `usd` to buy (`what`: "rent", "purchase"); where (market) and
    when (date: a year, a month or a day)."""

    what: str
    market: str
    date: str
    source: str
    usd_per_hour: float | None = None
    usd: float | None = None


@dataclass(frozen=True)
class Device:
    """A device of the catalogue, or a user's card. Peak figures, None where unknown or where the hardware has none.

    kind                "gpu", "cpu", or "unified": CPU and GPU share one memory
    memory_gib          nominal, GiB; None for a CPU whose memory was not said
    memory_options_gib  the sizes it is sold with, where there are several
    usable_gib          what an allocator can have of it: the total that the driver reports; of unified memory, the part
                        that the GPU gets by default
    bandwidth_gbs       of its memory, GB/s (10^9 bytes)
    *_tflops, *_tops    dense, 10^12 operations/s. fp32: vector units. fp16: matrix units with sums in fp32, as engines
                        use them; int8: matrix units, or dot-product instructions where there are none
    capability          NVIDIA: compute capability; AMD: gfx target; Apple: "metal"; CPU: instruction sets
    link, link_gbs      the fastest way to a second one, and what one device sends over it in one direction, GB/s
    sources             where each figure was read; "unverified ..." and "derived ..." say so
    """

    id: str
    name: str
    vendor: str
    arch: str
    kind: str
    aliases: tuple[str, ...]
    memory_gib: float | None
    usable_gib: float | None
    bandwidth_gbs: float | None
    fp32_tflops: float | None = None
    fp16_tflops: float | None = None
    bf16_tflops: float | None = None
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    tdp_w: float | None = None
    capability: str = ""
    link: str = ""
    link_gbs: float | None = None
    memory_options_gib: tuple[float, ...] = ()
    prices: tuple[Price, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def memory_bytes(self) -> int | None:
        """The usable memory in bytes."""
        return None if self.usable_gib is None else int(self.usable_gib * GIB)

    @property
    def unverified(self) -> tuple[str, ...]:
        """Figures for which no public source was found."""
        return tuple(name for name in FIGURES if self.sources.get(name, "").startswith("unverified"))

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(9, 0) for NVIDIA's "9.0"; None for other vendors and where it is not known."""
        major, dot, minor = self.capability.partition(".")
        nvidia = self.vendor == "NVIDIA" and dot and major.isdigit() and minor.isdigit()
        return (int(major), int(minor)) if nvidia else None

    def with_memory(self, gib: float) -> Device:
        """The same device with another amount of memory, as chips with unified memory and CPUs come."""
        text = f"derived: {usable_rule(self.vendor, self.kind)} of {gib:g} GiB"
        return replace(
            self,
            name=f"{self.name}, {gib:g} GB",
            memory_gib=gib,
            usable_gib=usable(self.vendor, self.kind, gib),
            sources={**self.sources, "memory_gib": _GIVEN, "usable_gib": text},
        )


def usable(vendor: str, kind: str, gib: float) -> float:
    """What is usable of `gib` where nobody has reported it."""
    if vendor == "Apple":  # Metal's recommendedMaxWorkingSetSize, as llama.cpp's logs print it for each size
        return round(gib * (0.75 if gib >= 36 else 2 / 3), 2)
    return round(gib * _USABLE[kind], 2)


def usable_rule(vendor: str, kind: str) -> str:
    return "Metal's default, 3/4 (2/3 below 36 GiB)," if vendor == "Apple" else f"{_USABLE[kind]:.0%}"


@dataclass(frozen=True)
class Target:
    """`count` devices of one kind, side by side."""

    device: Device
    count: int = 1

    @property
    def spec(self) -> str:
        """As --device takes it: "h100-sxm:2", "m3-max-40c-64g"."""
        size = f"-{self.device.memory_gib:g}g" if self.device.sources.get("memory_gib") == _GIVEN else ""
        return self.device.id + size + (f":{self.count}" if self.count > 1 else "")
