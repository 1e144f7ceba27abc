"""`generate` of `qkit.load` against llama.cpp on the same weights, decode and prefill apart, beside what is possible.

    python benchmarks/engines.py --work DIR --llamacpp PYTHON [--models SmolLM2-135M Llama-8B-8 Llama-8B-32 ...]
        [--gemma FILE] [--context 512 4096 16384] [--new 32] [--rounds 3] [--head w4|bf16] [--keep]

Llama-8B-N: the shape of Llama-3.1-8B with N decoder blocks (random_llama.py): the very same values, in groups of 32,
as W4A16 for qkit and as Q4_0 for llama.cpp, the head at 4 bits in both or at 16 in both (--head). SmolLM2-135M (`demo`)
and Gemma-3-270M (--gemma: its GGUF file): one bfloat16 source, rounded by qkit to W4A16 in groups of 32 and to GGUF
Q4_0, the head at 8 bits in both (llama.cpp's mix has it so). Made in DIR where it is not there; --models chooses.

Both engines of a model are loaded, each in a process that is stopped while the other has the machine (turns.py). They
take turns, context by context (those that the model takes), after a round that is not counted: one call each of a
prompt and --new tokens, greedy, batch 1, all cores; qkit's is `generate`, llama.cpp's llama_decode and its sampler in a
loop. Between them the read ceiling is looked for. Medians; prompts of more than 8,192 tokens, which take minutes, have
one round and no other. Ceiling of a token: what that engine's file holds of linears and head, and a 16-bit cache of the
context, at the speed at which memory is read; of a prompt: its multiplications as byte dot products. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ceiling import Reads, dots
from local_models import convert
from turns import Waiting

from qkit.estimate.subject import subject
from qkit.estimate.traffic import traffic
from qkit.measure.engines.table import ADAPTERS
from qkit.measure.footprint import own_environment

HERE = Path(__file__).parent
LONG = 8192  # prompts beyond it: one round
ENGINES = ("qkit", "llama.cpp")


def prepare(name: str, args: argparse.Namespace) -> dict[str, Path]:
    """Engine -> what it opens."""
    work = args.work / (f"{name}-{args.head}" if name.startswith("Llama") else name)
    folder, file = work / "w4a16", work / "q4_0.gguf"
    if name.startswith("Llama") and not file.exists():
        shape = ["--layers", name.rpartition("-")[2], "--head", args.head, "--group", "32", *args.shape]
        script = str(HERE / "random_llama.py")
        command = [sys.executable, script, str(work), *shape, "--only", "w4a16", "q4_0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elif not file.exists():
        shutil.rmtree(work, ignore_errors=True)
        source = "demo" if name == "SmolLM2-135M" else str(args.gemma)
        convert(source, work / "bf16", "--format", "safetensors", "--scheme", "none")
        packed = ("--scheme", "w4a16", "--group-size", "32", "--head", "8bit", "--method", "rtn")
        convert(str(work / "bf16"), folder, *packed)
        made = work / "gguf"
        convert(str(work / "bf16"), made, "--format", "gguf", "--scheme", "q4_0", "--method", "rtn")
        next(made.glob("*.gguf")).rename(file)
    return {"qkit": folder, "llama.cpp": file}


def start(name: str, path: Path, args: argparse.Namespace) -> Waiting:
    native = name == "llama.cpp"
    command = [args.llamacpp if native else sys.executable, str(HERE / "peers" / "speed_worker.py")]
    worker = Waiting(name, command, None if native else own_environment(), args.work / f"{name}.log")
    settings = {"model": str(path), "device": "cpu", "threads": args.threads, "generated": args.new}
    adapter = str(ADAPTERS / ("run_llamacpp.py" if native else "run_qkit.py"))
    print(f"  {worker.ask(adapter=adapter, settings=settings, own=False)['ready']}", file=sys.stderr, flush=True)
    return worker


def measure(name: str, args: argparse.Namespace, reads: Reads, dot: float | None) -> list[dict[str, Any]]:
    paths = prepare(name, args)
    workers: list[Waiting] = []
    taken: dict[tuple[int, str], list[dict[str, float]]] = {}
    try:
        for engine in ENGINES:
            workers.append(start(engine, paths[engine], args))
        most = subject(str(paths["qkit"])).config["max_position_embeddings"]
        for context in (c for c in args.context if c + args.new < most):
            for turn in range(1 if context > LONG else args.rounds + 1):
                for worker in workers:
                    answer = worker.ask(prompt=context, generated=args.new + 1, call=True)
                    if turn or context > LONG:
                        taken.setdefault((context, worker.name), []).append(answer)
                    reads.sweep()
                    print(f"  {worker.name}, {context} tokens: {answer}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    found = subject(str(paths["qkit"]))
    moved = traffic(found.arch, found.weights)
    read = {"qkit": moved.weight_bytes(1) + moved.head_bytes, "llama.cpp": read_of(paths["llama.cpp"])}
    rows = []
    for (context, engine), runs in taken.items():
        nbytes = read[engine] + moved.cache_bytes(context + args.new / 2)
        work = 2 * moved.values * context + moved.attention(context, context / 2)
        rows.append({
            "model": name, "engine": engine, "context": context, "rounds": len(runs), "token_bytes": nbytes,
            "prefill": statistics.median(context / r["first"] for r in runs),
            "decode": statistics.median(args.new / r["rest"] for r in runs),
            "decode_ceiling": reads.best / nbytes, "prefill_ceiling": dot and context * dot / work,
        })  # fmt: skip
    return rows


def read_of(file: Path) -> int:
    """Bytes of weights that a token reads: all but the embedding, unless it is the head too."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = ("model", "context", "engine", "prefill tok/s", "of ceiling", "decode tok/s", "of ceiling", "MB a token")
    lines = [f"| {' | '.join((*columns, 'prefill, decode over llama.cpp'))} |", "|---" * (len(columns) + 1) + "|"]
    peers = {(r["model"], r["context"]): r for r in rows if r["engine"] == "llama.cpp"}
    for r in rows:
        peer, ceiling = peers[r["model"], r["context"]], r["prefill_ceiling"]
        cells = [r["model"], f"{r['context']:,}", r["engine"], f"{r['prefill']:.1f}",
                 f"{r['prefill'] / ceiling:.0%}" if ceiling else "", f"{r['decode']:.2f}",
                 f"{r['decode'] / r['decode_ceiling']:.0%}", f"{r['token_bytes'] / 1e6:.0f}",
                 f"{r['prefill'] / peer['prefill']:.2f}, {r['decode'] / peer['decode']:.2f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--llamacpp", required=True, metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M", "Llama-8B-8", "Llama-8B-32"], metavar="NAME")
    parser.add_argument("--gemma", type=Path, metavar="FILE", help="gemma-3-270m.gguf; adds Gemma-3-270M")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--head", choices=("w4", "bf16"), default="w4")
    parser.add_argument("--shape", nargs=argparse.REMAINDER, default=[], help="last: other options of random_llama.py")
    parser.add_argument("--keep", action="store_true", help="keep what was made of Llama-8B-N")
    args = parser.parse_args()
    args.threads = len(os.sched_getaffinity(0))
    models = [*args.models, *(["Gemma-3-270M"] if args.gemma and "Gemma-3-270M" not in args.models else [])]
    for name in models:
        if name not in ("SmolLM2-135M", "Gemma-3-270M") and not name.removeprefix("Llama-8B-").isdigit():
            parser.error(f"unknown model {name}; known: SmolLM2-135M, Gemma-3-270M with --gemma, Llama-8B-N")
        if name == "Gemma-3-270M" and not args.gemma:
            parser.error("Gemma-3-270M needs --gemma FILE")
    args.work.mkdir(parents=True, exist_ok=True)
    reads, dot, rows = Reads(args.threads), dots(args.threads), []
    for name in models:
        print(name, file=sys.stderr, flush=True)
        rows += measure(name, args, reads, dot)
        if name.startswith("Llama") and not args.keep:
            shutil.rmtree(args.work / f"{name}-{args.head}")
    print(f"memory reads {reads.best / 1e9:.1f} GB/s, byte dot products {(dot or 0) / 1e9:.0f} GOP/s")
    print(markdown(rows))
    print(json.dumps({"threads": args.threads, "read_gbs": reads.best / 1e9, "gops": dot and dot / 1e9, "rows": rows}))


if __name__ == "__main__":
    main()
