"""GPTQ of decoder blocks of real width, on this machine: time, operations and resident memory over the whole run.

    python benchmarks/gptq_block.py [--shape 70b] [--blocks 1] [--samples 16 128] [--length 2048] [--max-memory 12GiB]

The source is that of `large_models.py`: shards with the real headers of the shape, random bfloat16 data, behind a
`Store`; embedding and head are there too. `qkit convert --method gptq` of it (W4A16, the shipped text, windows of
`--length` tokens) in a process of its own whose resident memory is looked at four times a second. "operations" is what
`predict_cost` counts: a product of matrices of m x k and k x n has 2 m k n. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import write_tokenizer
from large_models import SHAPES, Shards, convert, resident, write_pool


class WithTokenizer(Shards):
    """The shards, and a tokenizer of bytes."""

    def __init__(self, shape: str, blocks: int, pool: Path):
        from qkit.storage.local import LocalStore

        super().__init__(shape, blocks, pool)
        self._beside = LocalStore(pool.parent / "tokenizer")

    def names(self, folder: str = "") -> list[str]:
        return sorted([*super().names(folder), *([] if folder else self._beside.names())])

    def has(self, name: str) -> bool:
        return super().has(name) or self._beside.has(name)

    def open(self, name: str) -> Any:
        return super().open(name) if super().has(name) else self._beside.open(name)


def operations(args: argparse.Namespace, samples: int, pool: Path) -> float:
    """Of the blocks, as the plan counts them."""
    from qkit.calibrate.cost import predict_cost
    from qkit.conversion.options import Options
    from qkit.conversion.plan import make_plan
    from qkit.conversion.tasks import block_schemes
    from qkit.sources.folder import FolderSource

    source = FolderSource(WithTokenizer(args.shape, args.blocks, pool), label=args.shape)
    options = Options(method="gptq", calib_samples=samples, calib_len=args.length, max_memory=1 << 40)
    plan = make_plan(source, pool.parent / "planned", options)
    schemes = block_schemes(plan.tasks)
    return predict_cost(plan.view, schemes, samples, args.length, plan.method, plan.predicted.waiting).flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--max-memory", default="12GiB")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--pool", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pool:
        (samples,) = args.samples
        text = ("--calib-samples", str(samples), "--calib-len", str(args.length))
        shards = WithTokenizer(args.shape, args.blocks, args.pool)
        convert(shards, args.out, "--method", "gptq", *text, "--max-memory", args.max_memory)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        pool = write_pool(Path(scratch))
        (pool.parent / "tokenizer").mkdir()
        write_tokenizer(pool.parent / "tokenizer", SHAPES[args.shape][4])
        for samples in args.samples:
            command = [sys.executable, __file__, "--pool", str(pool), "--out", str(Path(scratch, f"out{samples}"))]
            command += ["--shape", args.shape, "--blocks", str(args.blocks), "--samples", str(samples)]
            command += ["--length", str(args.length), "--max-memory", args.max_memory]
            started = time.perf_counter()
            with tempfile.TemporaryFile("w+") as said:
                process = subprocess.Popen(command, stdout=said, stderr=subprocess.PIPE, text=True)
                seen = resident(process)
                said.seek(0)
                text = said.read()
            if process.returncode:
                assert process.stderr is not None
                sys.exit(process.stderr.read())
            answer = json.loads(text)
            row = {
                "shape": args.shape, "blocks": args.blocks, "samples": samples, "length": args.length,
                "seconds": time.perf_counter() - started, "operations": operations(args, samples, pool),
                "predicted": answer["plan"]["peak_memory_predicted_bytes"],
                "peak": answer["peak_memory_measured_bytes"],
                "seen": [(round(t, 1), b) for t, b in seen[:: max(1, len(seen) // 400)]],
            }  # fmt: skip
            rows.append(row)
            print(
                f"{args.shape}, {args.blocks} block(s), {samples} x {args.length} tokens: {row['seconds']:.0f} s, "
                f"{row['operations']:.2g} operations, {row['operations'] / row['seconds'] / 1e9:.0f} GFLOP/s; "
                f"peak {row['peak'] / 2**20:.0f} MiB, predicted {row['predicted'] / 2**20:.0f}",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
