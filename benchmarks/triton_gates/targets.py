"""The architectures kernels are compiled for, their limits, and the instruction budget of a memory-bound kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture, and a card that stands for it.

    backend, arch, warp  what `triton.backends.compiler.GPUTarget` takes
    shared               bytes of shared memory one block (workgroup) may use
    unit_shared, unit_threads  what one SM (CU) has for all its blocks
    card                 the card whose figures follow: bytes/s of memory, SMs (CUs), lanes one SM starts an instruction
                         for in one clock, clocks/s
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    unit_shared: int
    unit_threads: int
    card: str
    bandwidth: float
    units: int
    lanes: int
    clock: float

    def budget(self, bits: int) -> float:
        """Thread-instructions one weight may cost before issue slots, not memory, bound the kernel.

        The card reads bandwidth * 8 / bits weights a second and starts units * lanes * clock thread-instructions in
        the same second (an NVIDIA SM has four schedulers of 32 lanes, a CDNA CU four 16-lane and an RDNA CU two 32-lane
        SIMDs). Scales are not counted as bytes, so the budget is a little strict.
        """
        return self.units * self.lanes * self.clock / (self.bandwidth * 8 / bits)

    def blocks(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks one SM (CU) holds at a time; an estimate that rounds registers up to eight."""
        held = (
            (64 << 10) * (self.warp // 32) * (2 if self.backend == "hip" else 1)
        )  # registers of 32 bits per lane group
        by_registers = held // (-(-max(registers, 1) // 8) * 8 * threads)
        by_shared = self.unit_shared // (shared + 1024) if shared else 32
        return min(by_registers, by_shared, self.unit_threads // threads, 32)


# Shared memory per block: CUDA programming guide, compute capabilities (the opt-in maximum); LDS: CDNA3 and RDNA3 ISA.
TARGETS: tuple[Target, ...] = (
    Target("sm_80", "cuda", 80, 32, 163 << 10, 164 << 10, 2048, "A100 80GB SXM", 2.0e12, 108, 128, 1.40e9),
    Target("sm_86", "cuda", 86, 32, 99 << 10, 100 << 10, 1536, "RTX 3090", 0.936e12, 82, 128, 1.695e9),
    Target("sm_89", "cuda", 89, 32, 99 << 10, 100 << 10, 1536, "RTX 4090", 1.008e12, 128, 128, 2.52e9),
    Target("sm_90", "cuda", 90, 32, 227 << 10, 228 << 10, 2048, "H100 SXM", 3.35e12, 132, 128, 1.70e9),
    Target("sm_100", "cuda", 100, 32, 227 << 10, 228 << 10, 2048, "B200", 7.7e12, 148, 128, 1.85e9),
    Target("sm_120", "cuda", 120, 32, 99 << 10, 100 << 10, 1536, "RTX 5090", 1.792e12, 170, 128, 2.41e9),
    Target("gfx942", "hip", "gfx942", 64, 64 << 10, 64 << 10, 2048, "MI300X", 5.3e12, 304, 64, 2.10e9),
    Target("gfx1100", "hip", "gfx1100", 32, 64 << 10, 64 << 10, 1024, "RX 7900 XTX", 0.96e12, 96, 64, 2.30e9),
)

MAX_REGISTERS = {"cuda": 255, "hip": 512}  # per thread (hip: VGPR and AGPR together)
# The budget is a gate for kernels of few rows here; elsewhere it is a column.
BUDGET_GATED = ("sm_80", "sm_89", "sm_90")


def target(name: str) -> Target:
    """The target called `name`. Raises ValueError with the known names."""
    for known in TARGETS:
        if known.name == name:
            return known
    raise ValueError(f"no target {name!r}, only {', '.join(t.name for t in TARGETS)}")
