"""vLLM with and without qkit's plug-in, on the same weights, and where the time of a token goes.

    python benchmarks/vllm_decode.py --python VLLM_PYTHON --w4a16 FOLDER [--bf16 FOLDER] [--site DIR]
        [--batch 1 8] [--prompt 256] [--new 64] [--rounds 5] [--cores 0-1] [--one-at-a-time] [--eager]

Rows: the bfloat16 source in vLLM, the 4-bit folder in vLLM with its own kernel (QKIT_VLLM=0), the same folder with
qkit's. Each is an engine in a process of its own. They take turns, A B C A B C, one measurement each, and the memory's
read ceiling (ceiling.py) is looked for between them. Medians over the rounds. --one-at-a-time: where memory does not
hold all engines, each is started for its turn and ended after it. --bf16: a folder with config.json alone will do, vLLM
then makes weights up. --site: where qkit is, if not in VLLM_PYTHON's own environment (`pip install --no-deps --target
DIR .`). --cores: what vLLM's threads are bound to; by itself it leaves one core of every two out.

Decode and prefill tokens/s count all sequences of a batch. The ceiling of a decode step is what it reads, the linears,
the head and the cache of every sequence, at the speed of memory; that of prefill its multiplications as byte dot
products. Then, for each row, the operators of one decode step at each batch size, in milliseconds; what is missing from
the wall time is scheduling, sampling and processes talking to each other. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from ceiling import Reads, dots
from turns import Waiting

from qkit.estimate.subject import subject
from qkit.estimate.traffic import Traffic, traffic

PEERS = Path(__file__).parent / "peers"


def start(name: str, folder: Path, off: bool, args: argparse.Namespace) -> Waiting:
    """An engine process, ready."""
    path = [str(PEERS), *([str(args.site)] if args.site and not off else []), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "QKIT_VLLM": "0" if off else "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions sent to the worker: the profiler
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": args.cores,
    }
    length = max(args.prompt + args.new, 64) + 8  # a profile is of 32 steps
    code = "import vllm_engine; vllm_engine.main()"
    mode = "eager" if args.eager else "compiled"
    command = [args.python, "-c", code, str(folder), str(length), str(max(args.batch)), mode]
    engine = Waiting(name, command, env, args.log / f"{name.replace(' ', '-')}.log", "RESULT ")
    engine.first()
    return engine


def measure(engine: Waiting, args: argparse.Namespace, seen: dict[int, list[dict[str, float]]]) -> None:
    for batch in args.batch:
        seen.setdefault(batch, []).append(engine.ask(do="measure", batch=batch, prompt=args.prompt, new=args.new))


def profile(engine: Waiting, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    return {batch: engine.ask(do="profile", batch=batch) for batch in args.batch}


def run(rows: dict[str, tuple[Path, bool]], reads: Reads, args: argparse.Namespace) -> dict[str, Any]:
    seen: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in rows}
    profiles: dict[str, Any] = {}
    engines: list[Waiting] = []
    try:
        if args.one_at_a_time:
            for turn in range(args.rounds):
                for name, (folder, off) in rows.items():
                    engines.append(start(name, folder, off, args))
                    measure(engines[-1], args, {})  # warm
                    measure(engines[-1], args, seen[name])
                    if turn == args.rounds - 1:
                        profiles[name] = profile(engines[-1], args)
                    engines.pop().close()
                    reads.sweep()
        else:
            for name, (folder, off) in rows.items():
                engines.append(start(name, folder, off, args))
            for turn in range(args.rounds + 1):  # the first is not counted
                for engine in engines:
                    measure(engine, args, seen[engine.name] if turn else {})
                    reads.sweep()
            profiles = {engine.name: profile(engine, args) for engine in engines}
    finally:
        for engine in engines:
            engine.close()
    return {name: {"runs": seen[name], "profile": profiles[name]} for name in rows}


def traffic_of(folder: Path) -> Traffic:
    found = subject(str(folder))
    return traffic(found.arch, found.weights)


def summarize(
    results: dict[str, Any],
    rows: dict[str, tuple[Path, bool]],
    read: float,
    dot: float | None,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    summary = []
    for name, (folder, _) in rows.items():
        moved = traffic_of(folder)
        for batch, runs in results[name]["runs"].items():
            context = args.prompt + args.new / 2
            nbytes = moved.weight_bytes(batch) + moved.head_bytes + batch * moved.cache_bytes(context)
            work = 2 * moved.values * args.prompt + moved.attention(args.prompt, args.prompt / 2)
            prefill, decode = (statistics.median(r[kind] for r in runs) for kind in ("prefill", "decode"))
            summary.append({
                "engine": name, "batch": batch, "prefill": prefill, "decode": decode, "step_bytes": nbytes,
                "decode_ceiling": batch * read / nbytes, "prefill_ceiling": dot and args.prompt * dot / work,
            })  # fmt: skip
    return summary


def markdown(summary: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["engine"] for row in summary))[:-1]
    columns = ["engine", "batch", "prefill tok/s", "of ceiling", "decode tok/s", "of ceiling"]
    columns += [f"/ {name}" for name in names]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    decoded = {(row["engine"], row["batch"]): row["decode"] for row in summary}
    for row in summary:
        batch, ceiling = row["batch"], row["prefill_ceiling"]
        cells = [row["engine"], str(batch), f"{row['prefill']:.1f}",
                 f"{row['prefill'] / ceiling:.0%}" if ceiling else "?",
                 f"{row['decode']:.2f}", f"{row['decode'] / row['decode_ceiling']:.0%}",
                 *(f"{row['decode'] / decoded[name, batch]:.2f}" for name in names)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def where(results: dict[str, Any]) -> str:
    """The operators of a step, of each engine at each batch size."""
    lines = []
    for name, result in results.items():
        for batch, found in result["profile"].items():
            wall, operators = found["wall_us"] / 1e3, found["operators_us"] / 1e3
            lines.append(f"\n{name}, batch {batch}: a decode step takes {wall:.2f} ms")
            lines.append(f"  {'operators (profiler on)':<60}{'':>7}{operators:>10.3f} ms")
            lines += [f"  {op[:60]:<60}{calls:>6.1f}x{us / 1e3:>10.3f} ms" for op, calls, us in found["operators"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--w4a16", type=Path, required=True)
    parser.add_argument("--bf16", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", default=f"0-{(os.cpu_count() or 1) - 1}")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--log", type=Path, default=Path("."), help="folder for the engines' logs")
    args = parser.parse_args()
    args.log.mkdir(parents=True, exist_ok=True)
    rows: dict[str, tuple[Path, bool]] = {"vllm bf16": (args.bf16, True)} if args.bf16 else {}
    rows |= {"vllm w4a16": (args.w4a16, True), "vllm w4a16 + qkit": (args.w4a16, False)}
    reads, dot = Reads(), dots()
    results = run(rows, reads, args)
    summary = summarize(results, rows, reads.best, dot, args)
    print(f"memory reads {reads.best / 1e9:.1f} GB/s, byte dot products {(dot or 0) / 1e9:.0f} GOP/s")
    print(markdown(summary))
    print(where(results))
    facts = {"cores": args.cores, "prompt": args.prompt, "new": args.new, "rounds": args.rounds, "eager": args.eager}
    facts |= {"read_gbs": reads.best / 1e9, "gops": dot and dot / 1e9}
    sys.stdout.flush()
    print(json.dumps({**facts, "summary": summary, "results": results}))


if __name__ == "__main__":
    main()
