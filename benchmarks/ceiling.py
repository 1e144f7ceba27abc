"""The limits of this machine that speeds are shares of: bytes read from memory, and byte dot products, a second.

    python benchmarks/ceiling.py [--threads 1 2] [--seconds 10]

The read ceiling is the best pass ever seen over half a gigabyte in huge pages, which caches do not hold, in every way
of reading that ceiling.cpp has: one stream a thread to eight, prefetched or not. Nothing that computes may pass it:
where one does, it is no ceiling. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import mmap
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

NBYTES = 512 << 20
WAYS = tuple(itertools.product((1, 2, 4, 8), (0, 1024, 4096)))  # streams of a thread, bytes that prefetching is ahead


@functools.cache
def library() -> ctypes.CDLL:
    """benchmarks/ceiling.cpp, built for this machine."""
    source = Path(__file__).with_name("ceiling.cpp")
    built = Path(tempfile.mkdtemp(prefix="qkit-ceiling-"), "ceiling.so")
    subprocess.run(["c++", "-O3", "-march=native", "-shared", "-fPIC", "-o", built, source, "-pthread"], check=True)
    lib = ctypes.CDLL(str(built))
    lib.ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    lib.ceiling_dot.argtypes = [ctypes.c_int64, ctypes.c_int]
    return lib


@functools.cache
def _memory() -> tuple[mmap.mmap, int]:
    """(memory that is there, its address)."""
    memory = mmap.mmap(-1, NBYTES)
    with suppress(AttributeError, OSError):  # without huge pages part of the time is address translation
        memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, NBYTES, 1 << 20):  # pages of zeros that nobody wrote to would all be one page
        memory[at : at + (1 << 20)] = b"\1" * (1 << 20)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Reads:
    """`best`: bytes a second of the fastest pass so far, on so many threads."""

    def __init__(self, threads: int | None = None, sweeps: int = 3):
        self.threads = threads or len(os.sched_getaffinity(0))
        self.best, self.way = 0.0, WAYS[0]
        self._ways = itertools.cycle(WAYS)
        self.sweep(sweeps)

    def sweep(self, times: int = 1) -> float:
        for _ in range(times * len(WAYS)):
            self.look()
        return self.best

    def look(self) -> None:
        """One pass, in the next way: a few tens of milliseconds, for between the things measured."""
        way, (_, address) = next(self._ways), _memory()
        nbytes = NBYTES // (self.threads * 2048) * (self.threads * 2048)
        start = time.perf_counter()
        library().ceiling_read(address, nbytes, self.threads, *way)
        rate = nbytes / (time.perf_counter() - start)
        if rate > self.best:
            self.best, self.way = rate, way


def dots(threads: int | None = None, seconds: float = 0.3) -> float | None:
    """Multiplications and additions a second of byte dot products in registers; None where this build knows none."""
    threads = threads or len(os.sched_getaffinity(0))
    count, best, end = 500_000, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        ops = library().ceiling_dot(count, threads)
        if not ops:
            return None
        best = max(best, count * 12 * ops * threads / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    found = {}
    for threads in args.threads:
        reads, end = Reads(threads), time.perf_counter() + args.seconds
        while time.perf_counter() < end:
            reads.look()
        dot = dots(threads)
        streams, ahead = reads.way
        said = "byte dot products unknown" if dot is None else f"byte dot products {dot / 1e9:.0f} GOP/s"
        print(f"{threads} thread(s): {reads.best / 1e9:.1f} GB/s ({streams} streams, {ahead} bytes ahead), {said}")
        found[threads] = {"read_gbs": reads.best / 1e9, "streams": streams, "ahead": ahead, "gops": dot and dot / 1e9}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
