"""Checks and times every GPU kernel on the GPU that is present, in at most ten minutes.

    python benchmarks/gpu.py [--out profiles/reports] [--minutes 10] [--no-check] [--tune]

Needs torch and triton, no installation of qkit: any checkout will do. First what the card can do: memory read and
copied, bfloat16 products. Then every kernel against the oracle; a wrong one ends the run with exit code 1. With --tune
launch configurations for the layers below are measured and kept in profiles/triton. Then products of Llama 8B's and
70B's layers at M = 1, 16, 64, 256 and 4096, bfloat16 activations: torch, qkit and, where they can be imported, Marlin
(vLLM), bitsandbytes and gemlite, in turns. Each call is a CUDA graph and finds the caches cold. Writes gpu-<card>.json
and .md; the last line of stdout is the same JSON. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from checkout import ROOT

# out, in. The order is that of importance: a budget that runs out leaves the last ones.
SHAPES = {
    "8B gate/up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "70B gate/up": (57344, 8192),
    "70B down": (8192, 28672),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
}
ROWS = (1, 16, 64, 256, 4096)
BASE = "torch bfloat16"  # what speed-ups are over
ROUNDS = 5  # turns of each contender
CALLS = 12  # timed calls in a turn


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        return self._end - self._now()


class Timer:
    """Seconds of a call on the GPU: a captured graph between two events, after a write that empties the L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A graph's replay, or the call itself where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return call
        return graph.replay

    def __call__(self, run: Callable[[], Any], calls: int) -> list[float]:
        marks = []
        for _ in range(calls):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]


def in_turns(
    runs: dict[str, Callable[[], Any]], timer: Callable[..., list[float]], rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of every call of each run: A B A B, so that clocks and heat treat them alike. At least one round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        if i and clock.left() < 0:
            break
        for name, run in runs.items():
            times[name] += timer(run, CALLS)
    return times


def ceilings(timer: Timer) -> dict[str, float]:
    """Bytes a second read (a sum) and copied (read plus written), and dense bfloat16 operations a second."""
    a = torch.ones(256 << 20, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "read_bytes_per_s": a.nbytes / min(timer(a.sum, 20)),
        "copy_bytes_per_s": 2 * a.nbytes / min(timer(lambda: b.copy_(a), 20)),
        "bf16_flops": 2 * 8192**3 / min(timer(lambda: x @ y, 20)),
    }


def check(device: str, clock: Clock, small: bool = False, workers: int = 0) -> dict[str, Any]:
    """Runs `gpu_parts.checks`: how many, the worst against its bound, what failed, what there was no time for.

    workers  processes that share the checks out, and what they compile; 0: here"""
    from gpu_parts import checks

    number = len(list(checks.checks(device, small)))
    found: list[checks.Outcome] = []
    if not workers:
        for i in range(number):
            if clock.left() > 0:
                found.append(checks.outcome(i, device, small))
    else:
        # Spawned, not forked: CUDA does not outlive a fork.
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        running = [pool.submit(checks.outcome, i, device, small) for i in range(number)]
        try:
            for future in concurrent.futures.as_completed(running, timeout=clock.left()):
                found.append(future.result())
        except concurrent.futures.TimeoutError:
            pass
        except concurrent.futures.BrokenExecutor as fault:
            found.append(checks.Outcome(f"a process of {workers}", f"{type(fault).__name__}: {fault}", 0.0))
        for process in list(pool._processes.values()) if clock.left() <= 0 else ():
            process.terminate()
        pool.shutdown(cancel_futures=True)
    failed = [f"{one.name}: {one.fault}" for one in found if one.fault]
    worst = max((one.over_bound for one in found), default=0.0)
    return {"cases": len(found), "worst_over_bound": worst, "failed": failed, "skipped": max(0, number - len(found))}


def tune(clock: Clock) -> None:
    """Measures launch configurations for `SHAPES` at `ROWS`, and writes them to the card's file in profiles/triton."""
    from gpu_parts.checks import make

    from qkit.kernels import triton
    from qkit.kernels.triton import tune as tuning

    for about, shape in SHAPES.items():
        if clock.left() < 0:
            break
        packed = triton.prepack(make("int", 4, 128, False, shape, "cuda"))
        best = tuning.tune(packed, torch.bfloat16, ROWS)
        print(f"{about}: " + ", ".join(f"{m} {c}" for m, (c, _) in best.items()), file=sys.stderr, flush=True)


def rows_for(
    about: str,
    shape: tuple[int, int],
    m: int,
    times: dict[str, list[float]],
    sizes: dict[str, int],
    top: dict[str, float],
) -> list[dict[str, Any]]:
    """Figures of one product: seconds, bytes/s over the weight, x and y, share of the ceiling, speed-up over torch."""
    out, in_ = shape
    base = statistics.median(times[BASE])
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        moved = (sizes[name] + 2 * m * (in_ + out)) / median
        flops = 2 * m * in_ * out / median
        rows.append(
            {
                "layer": about,
                "out": out,
                "in": in_,
                "m": m,
                "name": name,
                "median_s": median,
                "min_s": min(seconds),
                "bytes_per_s": moved,
                "flops": flops,
                "of_bandwidth": moved / top["read_bytes_per_s"],
                "of_bf16": flops / top["bf16_flops"],
                "speedup": base / median,
            }
        )
    return rows


def measure(
    timer: Timer, top: dict[str, float], clock: Clock
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Rows of all products, who could not take part and why, and the layers there was no time for."""
    from gpu_parts.contenders import contenders

    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    left_out = []
    for about, shape in SHAPES.items():
        if clock.left() < 20:
            left_out.append(about)
            continue
        found, missing = contenders(shape, "cuda")
        absent |= missing
        for m in ROWS:
            plain = torch.randn(m, shape[1], device="cuda")
            runs = {}
            for c in found:
                x = plain.to(c.dtype)
                try:
                    runs[c.name] = timer.prepare(lambda c=c, x=x: c.run(x))  # type: ignore[misc]
                except Exception as error:
                    absent[f"{c.name}, {about}, M={m}"] = f"{type(error).__name__}: {str(error)[:200]}"
            times = in_turns(runs, timer, ROUNDS, clock)
            rows += rows_for(about, shape, m, times, {c.name: c.bytes for c in found}, top)
        del found
        torch.cuda.empty_cache()
    return rows, absent, left_out


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    top, done = report["ceilings"], report["checks"]
    lines = [
        f"# {report['device']}: qkit's GPU kernels",
        "",
        f"Measured {report['date']} by `{report['command']}`: "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        f"Ceilings, measured in the same run: read {top['read_bytes_per_s'] / 1e9:.0f} GB/s, copy "
        f"{top['copy_bytes_per_s'] / 1e9:.0f} GB/s, bfloat16 {top['bf16_flops'] / 1e12:.0f} TFLOP/s.",
        "",
        f"Correctness: {done['cases']} cases, worst error {done['worst_over_bound']:.2f} of what is allowed"
        + (f"; {done['skipped']} not run, time was up" if done["skipped"] else "")
        + (f"; **{len(done['failed'])} failed**" if done["failed"] else "")
        + ".",
    ]
    lines += [f"- {fault}" for fault in done["failed"]]
    for about in dict.fromkeys(row["layer"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["layer"] == about]
        lines += ["", f"## {about}, {rows[0]['out']} x {rows[0]['in']}", ""]
        lines += [
            f"| M | | median | min | GB/s | of read | of bf16 peak | {BASE} x |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['m']} | {r['name']} | {r['median_s'] * 1e6:.1f} us | {r['min_s'] * 1e6:.1f} us "
            f"| {r['bytes_per_s'] / 1e9:.0f} | {r['of_bandwidth']:.0%} | {r['of_bf16']:.0%} | {r['speedup']:.2f} |"
            for r in rows
        ]
    if report["absent"] or report["left_out"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {why}" for name, why in report["absent"].items()]
        lines += [f"- {about}: time was up" for about in report["left_out"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "profiles" / "reports")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--tune", action="store_true", help="measure launch configurations first, and keep the best")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no CUDA or ROCm device here: this benchmark checks and times the GPU that is present",
            file=sys.stderr,
        )
        return 2
    import triton

    import qkit

    clock = Clock(args.minutes * 60 - 15)  # what starting and writing take
    device = torch.cuda.get_device_properties(0)
    timer = Timer()
    report: dict[str, Any] = {
        "schema_version": 1,
        "kind": "gpu-kernels",
        "device": device.name,
        "memory_bytes": device.total_memory,
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/gpu.py" + " --tune" * args.tune,
        "versions": {
            "qkit": qkit.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        },
        "ceilings": ceilings(timer),
    }
    print(json.dumps(report["ceilings"]), file=sys.stderr, flush=True)
    # Compiling takes most of a check: half of the time at most, many at a time.
    half = Clock(clock.left() / 2)
    report["checks"] = (
        {"cases": 0, "worst_over_bound": 0.0, "failed": [], "skipped": 0}
        if args.no_check
        else check("cuda", half, workers=max(1, min(8, (os.cpu_count() or 2) // 2)))
    )
    print(json.dumps(report["checks"]), file=sys.stderr, flush=True)
    if args.tune and not report["checks"]["failed"]:
        tune(Clock(clock.left() / 2))
    rows, absent, left_out = ([], {}, []) if report["checks"]["failed"] else measure(timer, report["ceilings"], clock)
    report |= {"rows": rows, "absent": absent, "left_out": left_out}
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"gpu-{slug}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"gpu-{slug}.md").write_text(markdown(report))
    print(json.dumps(report))
    for fault in report["checks"]["failed"]:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if report["checks"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
