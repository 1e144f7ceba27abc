"""How fast a GGUF file becomes a bf16 checkpoint: seconds and GB/s, beside the ceiling of reading its bytes.

    python benchmarks/gguf_load.py FILE.gguf [--repeat 3] [--threads 2] [--peer]

Ceiling and qkit alternate; medians are printed. The ceiling is a plain read of the file into one buffer (from the
page cache, which the first, uncounted read fills). --peer adds transformers, once: it takes a minute where
qkit takes seconds. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

PIECE = 8 << 20


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_file(path: Path) -> None:
    buffer = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load(path: Path) -> dict[str, float]:
    """Seconds of each step, with qkit."""
    from qkit.sources.gguf import open_gguf

    start = time.perf_counter()
    source = open_gguf(path)
    opened = time.perf_counter()
    for name in source.names():
        source.read(name)
    read = time.perf_counter()
    tokenizer = timed(lambda: source.sidecars)
    return {"open": opened - start, "tensors": read - opened, "tokenizer": tokenizer}


def load_transformers(path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument("--peer", action="store_true", help="also time transformers, once")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    from qkit.sources.gguf.file import GgufFile
    from qkit.sources.gguf.model import GgufSource

    source = GgufSource(GgufFile(options.file))
    out_gb = sum(source.meta(name).nbytes for name in source.names()) / 1e9
    file_gb = options.file.stat().st_size / 1e9
    read_file(options.file)
    ceilings, runs = [], []
    for _ in range(options.repeat):
        ceilings.append(timed(lambda: read_file(options.file)))
        runs.append(load(options.file))
    steps = {step: statistics.median(run[step] for run in runs) for step in runs[0]}
    total = statistics.median(sum(run.values()) for run in runs)
    ceiling = statistics.median(ceilings)
    peer = timed(lambda: load_transformers(options.file)) if options.peer else None

    print(f"{options.file.name}: {file_gb:.3f} GB, {out_gb:.3f} GB as bf16, {torch.get_num_threads()} threads")
    print(f"  read ceiling {ceiling:8.3f} s  {file_gb / ceiling:6.2f} GB/s of file")
    for step, seconds in steps.items():
        rate = f"  {file_gb / seconds:6.2f} GB/s of file, {out_gb / seconds:.2f} GB/s of bf16"
        print(f"  {step:12} {seconds:8.3f} s{rate if step == 'tensors' else ''}")
    print(f"  {'total':12} {total:8.3f} s  {100 * ceiling / total:6.1f} % of the ceiling")
    if peer is not None:
        print(f"  transformers {peer:8.3f} s  {peer / total:6.1f} times as long")
    sys.stdout.flush()
    result = {"file": options.file.name, "file_gb": file_gb, "bf16_gb": out_gb, "threads": torch.get_num_threads()}
    print(json.dumps(result | {"ceiling_s": ceiling, "total_s": total, "steps_s": steps, "transformers_s": peer}))


if __name__ == "__main__":
    main()
