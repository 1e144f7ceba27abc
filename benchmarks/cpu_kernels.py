"""Speed of the CPU kernels against what this machine's memory can do.

First the ceiling: read and copy bandwidth of one and two threads, measured here. Then every kernel at shapes of real
models, with the bytes it has to read and write counted once, as a share of the copy ceiling (of the read ceiling for
the matmul). Median of many runs. Then what a call costs before any work. The last line of stdout is one JSON document.

    python benchmarks/cpu_kernels.py [--seconds 0.5] [--threads 1 2] [--shape 4096x14336 ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from ceiling import Reads

from qkit import kernels
from qkit.kernels.cpu import lib
from qkit.kernels.select import Weight, select

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "2048x640")


def times(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Least and median seconds of a call, from at least five calls after one to warm up."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken), statistics.median(taken)


def ceiling(threads: int, seconds: float) -> dict[str, float]:
    """GB/s of reading (ceiling.py), and of a plain copy (bytes read plus written) of 512 MB, with torch."""
    source = torch.ones(64 << 20, dtype=torch.int64)
    target = torch.empty_like(source)
    copy, _ = times(lambda: target.copy_(source), seconds)
    return {"read": Reads(threads).best / 1e9, "copy": 2 * source.nbytes / copy / 1e9}


def size(*tensors: torch.Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def cases(rows: int, cols: int) -> list[tuple[str, Callable[[], object], int, str]]:
    """(name, call, bytes read and written, which ceiling) for one [rows, cols] weight in groups of 128."""
    w = (torch.randn(rows, cols) * 0.02).bfloat16()
    codes, scale, zero, *_ = kernels.quantize_rtn(w, 4, 128, False, "BF16")
    packed, turned = kernels.pack(codes, 4), kernels.pack_transposed(codes, 4)
    out = torch.empty_like(w)
    x = torch.randn(1, cols).bfloat16()
    weight = Weight(packed, scale, zero, 4, cols)
    kernel = select(weight, torch.bfloat16)
    state = kernel.prepack(weight, None)
    rtn = size(w, codes, scale)
    return [
        ("quantize_rtn symmetric", lambda: kernels.quantize_rtn(w, 4, 128, True, "BF16"), rtn, "copy"),
        ("quantize_rtn asymmetric", lambda: kernels.quantize_rtn(w, 4, 128, False, "BF16"), rtn + size(zero), "copy"),
        ("pack", lambda: kernels.pack(codes, 4), size(codes, packed), "copy"),
        ("unpack", lambda: kernels.unpack(packed, 4, cols), size(codes, packed), "copy"),
        ("pack_transposed", lambda: kernels.pack_transposed(codes, 4), size(codes, packed), "copy"),
        ("unpack_transposed", lambda: kernels.unpack_transposed(turned, 4), size(codes, packed), "copy"),
        (
            "dequantize",
            lambda: kernels.dequantize(packed, scale, zero, 4, cols, torch.bfloat16, out=out),
            size(packed, scale, zero, out),
            "copy",
        ),
        ("matmul, 1 vector", lambda: kernel.matmul(x, state, None), size(packed, scale, zero), "read"),
        ("torch bf16 linear, 1 vector", lambda: torch.nn.functional.linear(x, w), size(w), "read"),
    ]


def call_cost() -> dict[str, float]:
    """Nanoseconds of a call that has nothing to do: the bare library, and the checked public function."""
    library = lib.load()
    codes = torch.zeros(0, 8, dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {"kernels.pack of nothing": lambda: kernels.pack(codes, 4)}
    if not isinstance(library, str):
        calls["qk_abi() through ctypes"] = library.qk_abi
        calls["qk_pack of nothing through ctypes"] = lambda: library.qk_pack(0, 0, 0, 8, 4, 0, 1)
    costs = {}
    for name, call in calls.items():
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(2000):
                call()
            best = min(best, (time.perf_counter() - start) / 2000)
        costs[name] = best * 1e9
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="ROWSxCOLS")
    args = parser.parse_args()

    rows = []
    ceilings = {}
    print(f"kernels: {kernels.backend()}, torch {torch.__version__}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        limit = ceilings[threads] = ceiling(threads, args.seconds)
        print(f"\n{threads} thread(s): read {limit['read']:.1f} GB/s, copy {limit['copy']:.1f} GB/s (best)")
        print(f"{'kernel':28} {'shape':>12} {'median ms':>10} {'best ms':>9} {'GB/s':>7} {'of ceiling':>11}")
        for shape in args.shape:
            n, k = (int(part) for part in shape.split("x"))
            for name, call, moved, bound in cases(n, k):
                best, median = times(call, args.seconds)
                speed = moved / median / 1e9
                share = speed / limit[bound]
                print(f"{name:28} {shape:>12} {median * 1e3:10.3f} {best * 1e3:9.3f} {speed:7.1f} {share:7.0%} {bound}")
                rows.append(
                    {"kernel": name, "shape": shape, "threads": threads, "median_s": median, "best_s": best,
                     "gb_per_s": speed, "ceiling": bound, "share_of_ceiling": share}
                )  # fmt: skip
    costs = call_cost()
    print()
    for name, cost in costs.items():
        print(f"{name:36} {cost:8.0f} ns")
    document = {"backend": kernels.backend(), "torch": torch.__version__, "ceiling_gb_per_s": ceilings, "rows": rows,
                "call_ns": costs}  # fmt: skip
    json.dump(document, sys.stdout)
    print()


if __name__ == "__main__":
    main()
