"""Tokens a second on this machine's CPU, as rows that speed_fit.py takes beside published ones.

    python benchmarks/local_speed.py --work DIR --prepare --gemma FILE    # makes the models, in minutes
    python benchmarks/local_speed.py --work DIR --llamacpp PYTHON -o profiles/local-speed.csv

Engines: qkit, llama.cpp (llama-cpp-python, in an environment of its own) and transformers' own forward; models and
formats: local_models.py. Every model in every format is a process; those of one model are loaded together and take
turns, round by round, so that what else the machine does falls on all alike. Decode: 32 tokens of prompt, then new
ones, as many as four seconds give, 16 to 64; up to 0.3 billion parameters also after 1,024 tokens. Prefill: 128, 512
(and 1,024) tokens. Batch 1, all threads. A figure is the median of the rounds. The bandwidth that stands with it is
what torch.sum reads of 256 MiB, seen before each round, the median of the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from local_models import FORMATS, Candidate, candidates, names, prepare

from qkit.estimate.subject import of_described
from qkit.hardware.detect import cpu
from qkit.measure import speed
from qkit.measure.engines.table import ADAPTERS
from qkit.measure.footprint import own_environment
from qkit.sources.described import describe_source

COLUMNS = (
    "model", "params_b", "format", "bits", "engine", "gpu", "n_gpus", "batch", "prompt_len", "gen_len_or_ctx", "phase",
    "tokens_per_s", "vram_gib", "source", "bandwidth_gbs", "head_bits",
)  # fmt: skip
WORKER = Path(__file__).parent / "peers" / "speed_worker.py"
SHORT, LONG, PROMPTS = 32, 1024, (128, 512)
SMALL = 0.3e9  # parameters up to which a long context is measured
SECONDS, LEAST, MOST = 4.0, 16, 64


class Worker:
    """A candidate, loaded in a process of its own."""

    def __init__(self, candidate: Candidate, threads: int, llamacpp: str | None):
        self.candidate = candidate
        native = candidate.engine == "llama.cpp"
        self.process = subprocess.Popen(
            [llamacpp if native else sys.executable, str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=None if native else own_environment(),
        )  # fmt: skip
        settings = {"model": str(candidate.path), "device": "cpu", "threads": threads, "generated": MOST}
        adapter = ADAPTERS / ("run_llamacpp.py" if native else "run_qkit.py")
        own = candidate.engine == "transformers"
        self.version = self._ask({"adapter": str(adapter), "settings": settings, "own": own})["ready"]
        self._ask({"prompt": SHORT, "generated": 2})
        step = statistics.median(self._ask({"prompt": SHORT, "generated": 6})["steps"])
        self.generated = max(LEAST, min(MOST, int(SECONDS / step)))
        self.seen: dict[tuple[str, int], list[float]] = {}  # phase, prompt -> tokens a second of each round

    def round(self, long: bool) -> None:
        self._note(SHORT, self.generated, prefill=False)
        for prompt in PROMPTS:
            self._note(prompt, 2, decode=False)
        if long:
            self._note(LONG, self.generated)

    def _note(self, prompt: int, generated: int, *, decode: bool = True, prefill: bool = True) -> None:
        answer = self._ask({"prompt": prompt, "generated": generated})
        if prefill:
            self.seen.setdefault(("prefill", prompt), []).append(prompt / answer["first"])
        if decode:
            rate = len(answer["steps"]) / sum(answer["steps"])
            self.seen.setdefault(("decode", prompt), []).append(rate)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.candidate.path} in {self.candidate.engine}: its process ended")
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    model: str, found: list[Candidate], rounds: int, llamacpp: str | None, bandwidths: list[float]
) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    workers = [Worker(each, threads, llamacpp) for each in found]
    facts = [of_described(describe_source(str(each.path))) for each in found]
    long = facts[0].arch.parameters <= SMALL
    for turn in range(rounds):
        bandwidths.append(speed.read_ceiling(torch.device("cpu")))
        for worker in workers:
            worker.round(long)
        print(f"{model}: round {turn + 1} of {rounds}, {bandwidths[-1]:.1f} GB/s", file=sys.stderr, flush=True)
    made = []
    for worker, subject in zip(workers, facts, strict=True):
        worker.close()
        arch, weights = subject.arch, subject.weights
        body, head = arch.matrices, arch.head or arch.embedding
        values = sum(m.numel for m in body if m.role in ("attention", "mlp"))
        held = weights.of_class("head") or weights.of_class("embedding")
        for (phase, prompt), rates in worker.seen.items():
            made.append({
                "model": model, "params_b": round(arch.parameters / 1e9, 4), "format": worker.candidate.format,
                "bits": round(8 * weights.of_class("attention", "mlp") / values, 3),
                "engine": _engine(worker), "gpu": f"CPU:{cpu().name} {threads}T", "n_gpus": 1, "batch": 1,
                "prompt_len": prompt, "gen_len_or_ctx": worker.generated if phase == "decode" else 0, "phase": phase,
                "tokens_per_s": round(statistics.median(rates), 2), "vram_gib": "",
                "head_bits": round(8 * held / head.numel, 3),
            })  # fmt: skip
            spread = max(rates) / min(rates) - 1
            print(f"  {made[-1]['engine']}, {worker.candidate.format}: {phase} {prompt}: "
                  f"{made[-1]['tokens_per_s']:.1f} tokens/s, {spread:.0%} apart", file=sys.stderr)  # fmt: skip
    return made


def _engine(worker: Worker) -> str:
    """As `qkit.estimate.engines.named` understands it."""
    if worker.candidate.engine == "llama.cpp":
        return f"llama.cpp ({worker.version}) CPU"
    if worker.candidate.engine == "transformers":
        import transformers

        return f"HF-transformers-{transformers.__version__} CPU"
    return "qkit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prepare", action="store_true", help="make the models, and stop")
    parser.add_argument("--gemma", type=Path, metavar="FILE", help="gemma-3-270m.gguf, as its package assembles it")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all, Gemma where it was prepared")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    there = args.gemma or (args.work / "gemma-3-270m" / "bf16").exists()
    models = args.models or [name for name in names() if name != "Gemma-3-270M" or there]
    if unknown := [name for name in models if name not in names()]:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(names())}")
    formats = [name for name in args.formats if args.llamacpp or args.prepare or FORMATS[name][0] != "llama.cpp"]
    prepare(args.work, models, formats, args.gemma)
    if args.prepare:
        return
    rows: list[dict[str, Any]] = []
    bandwidths: list[float] = []
    for model in models:
        rows += measure(model, candidates(args.work, [model], formats), args.rounds, args.llamacpp, bandwidths)
        if args.out:  # as far as it got
            write(args.out, rows, statistics.median(bandwidths), args.rounds)
    print(f"{len(rows)} figures; GB/s read: {min(bandwidths):.1f} to {max(bandwidths):.1f}", file=sys.stderr)


def write(path: Path, rows: list[dict[str, Any]], read: float, rounds: int) -> None:
    how = f"median of {rounds} rounds, read bandwidth {read:.1f} GB/s"
    source = f"measured by benchmarks/local_speed.py on {date.today()}, {how}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "source": source, "bandwidth_gbs": round(read, 1)} for row in rows)


if __name__ == "__main__":
    main()
