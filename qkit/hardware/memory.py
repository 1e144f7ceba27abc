"""Memory of this machine and of this process, in bytes; a container's limit counts as the machine's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


def available() -> tuple[int, int]:
    """(total, free): what processes here can use at most, and what is free of it now.

    Of a container, or of control groups inside one another, the tightest counts. Pages of files that the system keeps
    cached are free: it gives them back when memory is asked for."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used in _control_groups(_PROC):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return total, free


def limit() -> int:
    """What this process may plan to hold in all: what it holds already and what is free."""
    return available()[1] + resident()


def resident() -> int:
    """What this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int | None:
    """The most this process has held, since `reset_peak` where that works; None where the system does not say."""
    with suppress(OSError, StopIteration, ValueError):
        # Not getrusage: its figure covers what ran in this process before it became Python, and is never reset.
        lines = (_PROC / "status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


def reset_peak() -> bool:
    """Let `peak_resident` count from now on. False where the system cannot."""
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def give_back() -> None:
    """Let the system have what was freed. glibc keeps tensors of up to 32 MiB, and before 2.38 finds no use for them
    when the next of the same size is asked for with an alignment, as torch does: a process that reads one decoder block
    after another grows as if it held them all."""
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _control_groups(proc: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group around this process that limits memory, of either version."""
    with suppress(OSError, ValueError):
        mounts = _mounts(proc)
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version = "2" if not controllers else "1" if "memory" in controllers.split(",") else ""
            if version not in mounts:
                continue
            root, top = mounts[version]
            folder = top
            # Inside a container the path may be the host's; what is mounted is then the container's own group.
            with suppress(ValueError):
                folder = top / PurePosixPath(path).relative_to(root) if ".." not in path else top
            while True:
                found = _group(folder, version)
                if found is not None:
                    yield found
                if folder in (top, folder.parent):
                    break
                folder = folder.parent


def _mounts(proc: Path) -> dict[str, tuple[str, Path]]:
    """Version -> (the group that is mounted, where) of the hierarchies that can hold the memory controller."""
    found: dict[str, tuple[str, Path]] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, where = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            found.setdefault("2", (root, Path(where)))
        elif kind == "cgroup" and "memory" in options.split(","):
            found.setdefault("1", (root, Path(where)))
    return found


def _group(folder: Path, version: str) -> tuple[int, int] | None:
    """(limit, used) of one group; None where it has no limit."""
    limits, usage, cached = (
        (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
        if version == "2"
        else (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
    )
    found = [n for n in (_number(folder / name) for name in limits) if n is not None]
    used = _number(folder / usage)
    if not found or used is None:
        return None
    with suppress(OSError, ValueError):
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= sum(int(statistics.get(name, 0)) for name in cached)
    return min(found), max(0, used)


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
