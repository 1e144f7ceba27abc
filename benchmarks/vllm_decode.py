"""vLLM with and without qkit's plug-in, on the same weights, and where the time of a token goes.

    python benchmarks/vllm_decode.py --python VLLM_PYTHON --w4a16 FOLDER [--bf16 FOLDER] [--site DIR]
        [--batch 1 8] [--prompt 256] [--new 64] [--rounds 5] [--cores 0-1] [--one-at-a-time] [--eager]

Rows: the bfloat16 source in vLLM, the 4-bit folder in vLLM with its own kernel (QKIT_VLLM=0), the same folder with
qkit's. Each is an engine in a process of its own. They take turns, A B C A B C, one measurement each; waiting engines
are stopped (SIGSTOP), because vLLM's workers poll. Medians over the rounds. --one-at-a-time: where memory does not hold
all engines, each is started for its turn and ended after it. --site: where qkit is, if not in VLLM_PYTHON's own
environment (`pip install --no-deps --target DIR .`). --cores: what vLLM's threads are bound to; by itself it leaves
one core of every two out.

Decode and prefill tokens/s count all sequences of a batch. GB/s: weights that a decode step reads (all but the
embedding) times steps per second. Then, for each row, the operators of one decode step at each batch size, in
microseconds; what is missing from the wall time is scheduling, sampling and processes talking to each other. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
SAFETENSORS_HEADER = 8  # bytes of its length


class Engine:
    """One engine process, stopped while it waits."""

    def __init__(self, name: str, folder: Path, off: bool, args: argparse.Namespace):
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
        self.name = name
        self.log = open(args.log / f"{name.replace(' ', '-')}.log", "a")  # noqa: SIM115  # open as long as the engine
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._answer()
        self.pause()

    def ask(self, **command: Any) -> dict[str, Any]:
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.pause()
        return answer

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """Ends it, also where it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            self.log.write(line)
        self.close()
        raise SystemExit(f"{self.name} ended: see {self.log.name}")


def weight_bytes(folder: Path) -> int:
    """Bytes of every tensor but the embedding, from the headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(SAFETENSORS_HEADER), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and "embed_tokens" not in name:
                begin, end = entry["data_offsets"]
                total += end - begin
    return total


def measure(engine: Engine, args: argparse.Namespace, seen: dict[int, list[dict[str, float]]]) -> None:
    for batch in args.batch:
        seen.setdefault(batch, []).append(engine.ask(do="measure", batch=batch, prompt=args.prompt, new=args.new))


def profile(engine: Engine, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    return {batch: engine.ask(do="profile", batch=batch) for batch in args.batch}


def run(rows: dict[str, tuple[Path, bool]], args: argparse.Namespace) -> dict[str, Any]:
    seen: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in rows}
    profiles: dict[str, Any] = {}
    engines: list[Engine] = []

    def start(name: str) -> Engine:
        engines.append(Engine(name, *rows[name], args))
        return engines[-1]

    try:
        if args.one_at_a_time:
            for turn in range(args.rounds):
                for name in rows:
                    engine = start(name)
                    measure(engine, args, {})  # warm
                    measure(engine, args, seen[name])
                    if turn == args.rounds - 1:
                        profiles[name] = profile(engine, args)
                    engines.pop().close()
        else:
            for name in rows:
                start(name)
            for turn in range(args.rounds + 1):  # the first is not counted
                for engine in engines:
                    measure(engine, args, seen[engine.name] if turn else {})
            profiles = {engine.name: profile(engine, args) for engine in engines}
    finally:
        for engine in engines:
            engine.close()
    return {name: {"runs": seen[name], "profile": profiles[name]} for name in rows}


def report(results: dict[str, Any], rows: dict[str, tuple[Path, bool]], args: argparse.Namespace) -> list[dict]:
    summary = []
    print(f"{'engine':<20}{'batch':>6}{'prefill tok/s':>15}{'decode tok/s':>14}{'GB/s':>7}{'of the first':>14}")
    first: dict[int, float] = {}
    for name, (folder, _) in rows.items():
        for batch, runs in results[name]["runs"].items():
            prefill = statistics.median(r["prefill"] for r in runs)
            decode = statistics.median(r["decode"] for r in runs)
            base = first.setdefault(batch, decode)
            rate = weight_bytes(folder) * decode / batch / 1e9
            print(f"{name:<20}{batch:>6}{prefill:>15.1f}{decode:>14.2f}{rate:>7.1f}{decode / base:>14.2f}")
            summary.append({"engine": name, "batch": batch, "prefill": prefill, "decode": decode, "gbs": rate})
    for name in rows:
        for batch, found in results[name]["profile"].items():
            print(f"\n{name}, batch {batch}: a decode step takes {found['wall_us']:.0f} us")
            print(f"  {'operators (profiler on)':<60}{'':>7}{found['operators_us']:>10.0f} us")
            for operator, calls, us in found["operators"]:
                print(f"  {operator[:60]:<60}{calls:>6.1f}x{us:>10.0f} us")
    return summary


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
    results = run(rows, args)
    summary = report(results, rows, args)
    facts = {"cores": args.cores, "prompt": args.prompt, "new": args.new, "rounds": args.rounds, "eager": args.eager}
    sys.stdout.flush()
    print(json.dumps({**facts, "summary": summary, "results": results}))


if __name__ == "__main__":
    main()
