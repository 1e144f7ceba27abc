"""The memory that one model takes, measured in a process of its own, where nothing else was loaded before.

`apart` starts that process: `python -m qkit.measure.footprint`, which reads a request as JSON on stdin and prints a
`Footprint` as JSON, or {"problem": ...}, as the last line of its stdout.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from ..hardware import memory as process
from . import memory, speed

WARM_UP = 4  # tokens: enough that kernels are chosen, weights packed for them and libraries set up
# A threshold that is set stays: glibc then gives every freed tensor back to the system, and the peak does not depend
# on what loading left behind. For memory alone: pages that are new each time make a prompt take up to twice as long.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device, as `types.Memory` defines them."""

    kv_cache: int
    activations: int
    process: int
    total: int
    host: int
    seen: str


def apart(model: str, device: str, prompt: list[int], batch: int, free: int) -> Footprint | str:
    """What `model` takes on `device` ("cpu", "cuda:0") with `prompt` in each of `batch` sequences; or, where the
    process failed, why. free: bytes free on the device now, before that process exists."""
    import torch

    threads = torch.get_num_threads()
    request = {"model": model, "device": device, "prompt": prompt, "batch": batch, "free": free, "threads": threads}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qkit.measure.footprint"],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**own_environment(), **_ALLOCATOR},
            check=False,
        )
    except OSError as error:
        return f"no process could be started: {error.strerror or error}"
    if done.returncode:
        return ending(done.returncode, done.stderr)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return str(answer["problem"]) if "problem" in answer else Footprint(**answer)
    except (IndexError, TypeError, ValueError):
        return "its process gave no answer"


def own_environment() -> dict[str, str]:
    """For a process with the same code as here, wherever that was imported from, and nothing that lies in the current
    folder by chance."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def ending(code: int, stderr: str) -> str:
    """Why a process failed, in a line."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its process was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    last = [line for line in stderr.splitlines() if line.strip()][-1:]
    return f"its process failed with exit code {code}" + (f": {last[0].strip()[:300]}" if last else "")


def measure(model: str, device: str, prompt: list[int], batch: int, free: int, threads: int) -> Footprint:
    """Load `model` in this process and see what it takes: `prompt` but its last token at once, then that one."""
    import torch

    from ..runtime import load

    torch.set_num_threads(threads)
    loaded = load(model, device=device)
    ids = torch.tensor([prompt]).repeat(batch, 1).to(loaded.device)
    speed.steps(loaded, ids[:, :WARM_UP], 2)
    gc.collect()
    held = _held(loaded.device, free)
    with memory.peak(loaded.device) as peak:
        _, _, cache = speed.steps(loaded, ids[:, :-1], 2)
        above, seen = peak()
    kv_cache = memory.cache_bytes(cache)
    own = max(0, held - memory.weights(loaded).total)
    activations = max(0, above - kv_cache)
    total = memory.weights(loaded).total + own + kv_cache + activations
    return Footprint(kv_cache, activations, own, total, process.resident(), seen)


def _held(device: Any, free: int) -> int:
    """Bytes this process holds on the device."""
    if device.type != "cuda":
        return process.resident()
    import torch

    # The driver's context and the kernels' code are in no allocator's count: what was free and is not any more.
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return max(torch.cuda.memory_allocated(device), free - torch.cuda.mem_get_info(device)[0])


def main() -> None:
    try:
        answer = asdict(measure(**json.load(sys.stdin)))
    except Exception as error:  # whatever it is, the profile goes on without these figures
        first = (str(error).splitlines() or [""])[0][:300]
        answer = {"problem": f"{type(error).__name__}: {first}"}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
