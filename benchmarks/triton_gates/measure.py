"""Compiles what a launcher would launch, for a card that is not here, and measures the machine code."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import listing
from .targets import TARGETS, Target


class _Driver:
    """Stands in for Triton's driver: a card of the target's kind that can be compiled for and nothing else."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp)
        self._index = 1000 + TARGETS.index(target)  # a device of its own in the caches of Triton's kernels

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Any:
        return None


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel as compiled, the values of its arguments by name, how many programs."""

    name: str
    compiled: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[list[Launch]]:
    """Inside, launches compile for `target`, are noted in the list and run nothing; torch sees a card of that kind.

    Arguments may be fake tensors (`fake`): pointers count as aligned to 16 bytes, as the allocator's are.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction, MockTensor

    from qkit.kernels.triton import device

    launches: list[Launch] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        mocked = [MockTensor(a.dtype, a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        named = {k: MockTensor(a.dtype, a.shape) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
        compiled = run(self, *mocked, grid=None, warmup=True, **named)
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, compiled, names, tuple(grid(names) if callable(grid) else grid)))
        return compiled

    capability = (9, 4) if target.backend == "hip" else divmod(int(target.arch), 10)
    about = {"multi_processor_count": target.units, "name": target.card, "warp_size": target.warp}
    properties = type("Properties", (), about)()
    stand_ins = {
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: target.card,
        "current_device": lambda: 0,
        "is_available": lambda: True,
        "device_of": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    kept = {name: getattr(torch.cuda, name) for name in stand_ins}
    previous, hip = driver._active, torch.version.hip
    try:
        driver.set_active(_Driver(target))  # type: ignore[arg-type]
        JITFunction.run = note  # type: ignore[method-assign]
        torch.version.hip = "6.4" if target.backend == "hip" else None
        for name, stand_in in stand_ins.items():
            setattr(torch.cuda, name, stand_in)
        device._card.cache_clear()
        yield launches
    finally:
        device._card.cache_clear()
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active, torch.version.hip = previous, hip
        for name, original in kept.items():
            setattr(torch.cuda, name, original)


def launched(target: Target, call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches on a card of the target's kind; tensors it makes are fake and on "cuda"."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pretend(target) as launches, FakeTensorMode(allow_non_fake_inputs=True):
        call()
    return launches


def fake(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory on "cuda"; only inside `launched`."""
    return torch.empty(shape, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class Code:
    """Resources of one compiled kernel and the instructions of its main loop."""

    registers: int  # per thread
    stack: int  # bytes per thread: stack, local memory (hip: scratch)
    spills: int  # spill instructions (hip: spilled registers)
    shared: int  # bytes per block
    threads: int
    unroll: int  # turns of the kernel's loop in one turn of the machine's
    counts: listing.Counts


def measure(compiled: Any, target: Target) -> Code:
    """Reads a compiled kernel. Raises RuntimeError if a tool's output is not understood."""
    threads = compiled.metadata.num_warps * target.warp
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            if found is None:
                raise RuntimeError(f"no .{name} in the listing of {compiled.name}")
            return int(found[1])

        counts = listing.count(text, listing.AMDGCN)
        # vgpr_count already includes the accumulation registers where they share one file (gfx90a and later).
        spills = field("vgpr_spill_count") + field("sgpr_spill_count")
        return Code(field("vgpr_count"), field("private_segment_fixed_size"), spills, shared, threads, 1, counts)
    usage, text = disassemble(compiled.asm["cubin"])
    counts = listing.count(text, listing.SASS)
    unroll = _unrolled(compiled.asm["ptx"], text) if counts.looped else 1
    return Code(usage["REG"], usage["STACK"] + usage["LOCAL"], counts.spills_anywhere, shared, threads, unroll, counts)


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage (REG, STACK, LOCAL, SHARED) and SASS, by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        text = run(str(tools / "nvdisasm"), "-c", file.name)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    if not {"REG", "STACK", "LOCAL"} <= found.keys():
        raise RuntimeError(f"cuobjdump -res-usage said: {usage}")
    return found, text


def _unrolled(ptx: str, sass: str) -> int:
    """How many turns of the kernel's loop the assembler put into one: its loads against those in the PTX."""
    before, after = listing.count(ptx, listing.PTX), listing.count(sass, listing.SASS)
    return max(1, round(after.loads / before.loads)) if before.looped and before.loads else 1
