"""Data-free conversion against a plain copy of the same files, interleaved in one run.

    python benchmarks/convert_speed.py [SOURCE_FOLDER] [--gigabytes 2]

Ceilings first: reading the source from the page cache, and copying its files (read, write, fsync), which is what
the disk allows. Then `qkit convert --method rtn` of the same folder, with and without its verification. GB/s are
source bytes per second. Without a folder a Llama-shaped random bfloat16 checkpoint is made. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Llama-3.1-8B's layers, as many as fill `gigabytes`, random bfloat16."""
    import torch

    from qkit.spec.dtypes import TensorMeta
    from qkit.storage.local import LocalStore
    from qkit.storage.writer import write_safetensors

    hidden, wide, kv = 4096, 14336, 1024
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    per_layer = 2 * sum(a * b for a, b in shapes.values())
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    entries = [
        (f"model.layers.{i}.{name}.weight", TensorMeta("BF16", shape))
        for i in range(layers)
        for name, shape in shapes.items()
    ]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(wide * hidden, generator=generator).mul_(0.02).bfloat16()
    write_safetensors(
        LocalStore(folder), "model.safetensors", entries, (noise[: m.numel].view(m.shape) for _, m in entries)
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def read_all(source: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in source.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def copy_all(source: Path, target: Path) -> None:
    """Copy with fsync, as a converted file is written."""
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as f, open(target / path.name, "wb", buffering=0) as g:
            shutil.copyfileobj(f, g, 8 << 20)
            os.fsync(g.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    args = parser.parse_args()

    import qkit

    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        source = args.source or work / "source"
        if args.source is None:
            source.mkdir()
            make_checkpoint(source, args.gigabytes)
        nbytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        steps = {
            "read from page cache": lambda: read_all(source),
            "copy with fsync": lambda: copy_all(source, work / "out"),
            "convert rtn w4a16": lambda: qkit.convert(str(source), work / "out", method="rtn"),
            "convert rtn w4a16, not verified": lambda: qkit.convert(
                str(source), work / "out", method="rtn", verify=False
            ),
            "convert rtn w8a16": lambda: qkit.convert(str(source), work / "out", method="rtn", scheme="w8a16"),
        }
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(args.repeats):  # interleaved, so that a noisy neighbour disturbs them alike
            for step, run in steps.items():
                shutil.rmtree(work / "out", ignore_errors=True)
                started = time.perf_counter()
                run()
                seconds[step].append(time.perf_counter() - started)
    print(f"source {nbytes / 1e9:.2f} GB, median of {args.repeats}")
    copy = statistics.median(seconds["copy with fsync"])
    rows = {}
    for step, values in seconds.items():
        median = statistics.median(values)
        rate = nbytes / median / 1e9
        rows[step] = {"seconds": median, "min": min(values), "gb_per_s": rate, "of_copy": copy / median}
        print(
            f"{step:34} {median:7.2f} s (min {min(values):.2f})  {rate:6.2f} GB/s  {100 * copy / median:4.0f}% of copy"
        )
    print(json.dumps({"source_bytes": nbytes, "repeats": args.repeats, "steps": rows}))


if __name__ == "__main__":
    main()
