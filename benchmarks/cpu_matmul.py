"""The C++ matmul against the limits of the machine and against torch, interleaved in one run.

The ceiling first: bytes read from memory a second, and byte dot products a second, on one and two threads. Then
products at shapes of an 8B model with weights rotated out of the caches, ours and torch's in turns (A B A B): bfloat16
linear, the int4 and int8 weight products. Least and median of many runs; ratios are of medians. The last line of stdout
is one JSON document.

    python benchmarks/cpu_matmul.py [--seconds 0.6] [--threads 1 2] [--rows 1 2 4 8 16 64 512] [--shape 4096x4096 ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ceiling import Reads, dots

from qkit import kernels
from qkit.kernels.select import Weight, select

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
NAN = float("nan")
ROTATE = 192 << 20  # bytes of weights in turn: more than any cache here


def measure(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, tuple[float, float]]:
    """Least and median seconds of each call, all of them in turns, for `seconds` a call in all (at least 5 rounds)."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: (min(t), statistics.median(t)) for name, t in taken.items()}


class Turn:
    """A product over copies of a weight in turn, so that each call reads it from memory."""

    def __init__(self, make: Callable[[], Callable[[torch.Tensor], object]], nbytes: int):
        self.copies = [make() for _ in range(max(2, -(-ROTATE // nbytes)))]
        self.nbytes, self.at = nbytes, 0

    def __call__(self, x: torch.Tensor) -> object:
        self.at = (self.at + 1) % len(self.copies)
        return self.copies[self.at](x)


def ours(n: int, k: int, kind: str, bits: int, activations: str | None) -> Callable[[], Any]:
    def make() -> Any:
        packed = torch.randint(-(1 << 31), (1 << 31) - 1, (n, k * bits // 32), dtype=torch.int32)
        scale = torch.rand(n, k // 128).add_(0.5).div_(100)
        weight = Weight(packed, scale.bfloat16() if kind == "int" else scale, None, bits, k, kind)
        kernel = select(weight, torch.bfloat16, activations)
        state = kernel.prepack(weight, activations)
        return lambda x: kernel.matmul(x, state, None)

    return make


def torch_peers(n: int, k: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (maker of x -> product, bytes of the weight). Those this torch lacks are left out."""

    def linear() -> Any:
        w = torch.randn(n, k).bfloat16()
        return lambda x: torch.nn.functional.linear(x, w)

    def int4() -> Any:
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale_zero = torch.rand(k // 128, n, 2).bfloat16()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scale_zero)

    def int8() -> Any:
        w = torch.randint(-128, 127, (n, k), dtype=torch.int8)
        scale = torch.rand(n).bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, w, scale)

    peers = {"torch bf16": (linear, 2 * n * k), "torch int4 g128": (int4, n * k // 2), "torch int8": (int8, n * k)}
    probe = torch.zeros(1, k).bfloat16()
    usable = {}
    for name, (make, nbytes) in peers.items():
        try:
            make()(probe)
            usable[name] = (make, nbytes)
        except (AttributeError, RuntimeError) as error:
            print(f"{name}: not in this torch ({str(error).splitlines()[0]})")
    return usable


OURS = {
    "W4 g128": ("int", 4, None), "W4 g128, int8 act": ("int", 4, "int8"), "NF4 g128": ("nf4", 4, None),
    "W8 g128": ("int", 8, None), "W8 g128, int8 act": ("int", 8, "int8"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.6, help="time spent on each product")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    limits: dict[int, dict[str, float | None]] = {}
    print(f"kernels: {kernels.backend()}, torch {torch.__version__}")

    for threads in args.threads:
        torch.set_num_threads(threads)
        reads, most = Reads(threads), dots(threads)
        print(f"\n{threads} thread(s): reads {reads.best / 1e9:.1f} GB/s; byte dot products "
              f"{(most or NAN) / 1e9:.0f} GOP/s")  # fmt: skip
        print(f"{'product':20} {'out x in':>12} {'rows':>5} {'best ms':>9} {'median':>9} {'GB/s':>7} {'of read':>8} "
              f"{'GOP/s':>7} {'of dot':>7} {'vs bf16':>8} {'vs int4':>8}")  # fmt: skip
        for shape in args.shape:
            n, k = (int(part) for part in shape.split("x"))
            turns: dict[str, Turn] = {}
            for name, (kind, bits, activations) in OURS.items():
                nbytes = n * k * bits // 8 + n * k // 128 * (2 if kind == "int" else 4)
                turns[name] = Turn(ours(n, k, kind, bits, activations), nbytes)
            turns |= {name: Turn(make, nbytes) for name, (make, nbytes) in torch_peers(n, k).items()}
            for m in args.rows:
                if m > 16 and shape != args.shape[0]:
                    continue  # large products are bound by arithmetic: one shape tells
                x = torch.randn(m, k).bfloat16()
                # The memory also among the products: on a shared machine it is not the same from one second to the
                # next. The best of all is the ceiling.
                calls = {"": reads.look, **{name: partial(turn, x) for name, turn in turns.items()}}
                found = measure(calls, args.seconds)
                del found[""]
                read_gbs = reads.best / 1e9
                for name, (best, median) in found.items():
                    gbs, gops = turns[name].nbytes / best / 1e9, 2 * m * n * k / best / 1e9
                    ratios = [found[p][1] / median if p in found else None for p in ("torch bf16", "torch int4 g128")]
                    print(f"{name:20} {shape:>12} {m:5} {best * 1e3:9.3f} {median * 1e3:9.3f} {gbs:7.1f} "
                          f"{gbs / read_gbs:8.0%} {gops:7.0f} {gops * 1e9 / (most or NAN):7.0%} "
                          + " ".join(f"{r:8.2f}" if r else f"{'-':>8}" for r in ratios), flush=True)  # fmt: skip
                    rows.append(
                        {"product": name, "shape": shape, "rows": m, "threads": threads, "best_s": best,
                         "median_s": median, "gb_per_s": gbs, "read_gbs": read_gbs, "gop_per_s": gops,
                         "vs_torch_bf16": ratios[0], "vs_torch_int4": ratios[1]}
                    )  # fmt: skip
        limits[threads] = {"read_gbs": reads.best / 1e9, "gops": most and most / 1e9}
    document = {"backend": kernels.backend(), "torch": torch.__version__, "ceilings": limits, "rows": rows}
    json.dump(document, sys.stdout)
    print()


if __name__ == "__main__":
    main()
