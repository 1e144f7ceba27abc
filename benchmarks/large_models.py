"""Rounding models that are far larger than memory: time, bytes per second and resident memory over the whole run.

    python benchmarks/large_models.py [--shapes 8b 32b 70b] [--blocks N] [--work DIR] [--plot FILE.svg] [--csv FILE.csv]

The source is a `Store`: shards with the real headers of the shape, one for each decoder block, whose data is read from
one file of random bfloat16 again and again; nothing of it lies on a disk but that file, which the page cache holds. So
what is read is data, and reading costs what it costs from the cache. `qkit convert --method rtn` of it (W4A16,
defaults) runs in a process of its own whose resident memory is looked at four times a second; beside it, in turns, a
plain copy of some of the same bytes (read, write, fsync), without hashing. GB/s are source bytes per second. Results
are written to --work and removed. --blocks: fewer decoder blocks of the shapes. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# hidden, intermediate, KV width, layers, vocabulary: Llama-3.1-8B, Qwen2.5-32B, Llama-3.3-70B
SHAPES = {
    "8b": (4096, 14336, 1024, 32, 128256),
    "32b": (5120, 27648, 1024, 64, 152064),
    "70b": (8192, 28672, 1024, 80, 128256),
}
_POOL = 1 << 29  # bytes of random weights
_COPIED = 8e9  # source bytes of the plain copy


def tensors_of(shape: str, blocks: int | None) -> list[dict[str, tuple[int, ...]]]:
    """Name -> shape, for each shard."""
    hidden, wide, kv, layers, vocabulary = SHAPES[shape]
    shards: list[dict[str, tuple[int, ...]]] = []
    for i in range(blocks or layers):
        p = f"model.layers.{i}."
        shards.append(
            {f"{p}self_attn.{n}_proj.weight": s for n, s in (("q", (hidden, hidden)), ("k", (kv, hidden)),
             ("v", (kv, hidden)), ("o", (hidden, hidden)))}
            | {f"{p}mlp.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
            | {f"{p}mlp.down_proj.weight": (hidden, wide)}
            | {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        )  # fmt: skip
    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    return [*shards, ends | {"model.norm.weight": (hidden,)}]


def config_of(shape: str, blocks: int | None) -> dict[str, Any]:
    hidden, wide, kv, layers, vocabulary = SHAPES[shape]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": blocks or layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv // 128, "head_dim": 128, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    }  # fmt: skip


class Repeated:
    """`store.Reader`: a header, and data out of the pool."""

    def __init__(self, name: str, head: bytes, nbytes: int, pool: int):
        self.label = self.name = name
        self._head, self.nbytes, self._pool = head, len(head) + nbytes, pool

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        if offset < len(self._head):
            done = min(len(buffer), len(self._head) - offset)
            buffer[:done] = self._head[offset : offset + done]
        while done < len(buffer):
            at = (offset + done - len(self._head)) % _POOL
            done += os.preadv(self._pool, [buffer[done : done + _POOL - at]], at)

    def close(self) -> None:
        pass


class Shards:
    """`store.Store` over them."""

    def __init__(self, shape: str, blocks: int | None, pool: Path):
        from qkit.spec.dtypes import TensorMeta
        from qkit.storage.writer import safetensors_header

        self.label = shape
        fd = os.open(pool, os.O_RDONLY)
        shards = tensors_of(shape, blocks)
        config = config_of(shape, blocks)
        self._files: dict[str, Repeated] = {}
        index: dict[str, str] = {}
        for i, tensors in enumerate(shards, 1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            entries = [(n, TensorMeta("BF16", s)) for n, s in tensors.items()]
            data = sum(meta.nbytes for _, meta in entries)
            self._files[name] = Repeated(name, safetensors_header(entries), data, fd)
            index |= dict.fromkeys(tensors, name)
        for name, value in (("config.json", config), ("model.safetensors.index.json", {"weight_map": index})):
            self._files[name] = Repeated(name, json.dumps(value).encode(), 0, fd)

    def names(self, folder: str = "") -> list[str]:
        return [] if folder else sorted(self._files)

    def has(self, name: str) -> bool:
        return name in self._files

    def open(self, name: str) -> Repeated:
        return self._files[name]

    def pieces(self, nbytes: float) -> Iterator[memoryview]:
        """About so many bytes of the shards, one after the other."""
        buffer = memoryview(bytearray(32 << 20))
        for file in self._files.values():
            for offset in range(0, file.nbytes, len(buffer)):
                if nbytes <= 0:
                    return
                piece = buffer[: min(len(buffer), file.nbytes - offset)]
                file.read_into(piece, offset)
                nbytes -= len(piece)
                yield piece


def convert(store: Shards, out: Path, *options: str) -> NoReturn:
    """In a process of its own: what `qkit convert NAME -o OUT OPTIONS --json` does, of this source."""
    from qkit import cli, sources
    from qkit.sources.folder import FolderSource

    sources.open_source = lambda *given, **more: FolderSource(store, label=store.label)  # type: ignore[assignment,arg-type,return-value]
    sys.exit(cli.main(["convert", store.label, "-o", str(out), *options, "--json"]))


def resident(process: subprocess.Popen[Any]) -> list[tuple[float, int]]:
    """(seconds, resident bytes) four times a second, until the process ends."""
    seen: list[tuple[float, int]] = []
    started = time.perf_counter()
    while process.poll() is None:
        try:
            fields = Path(f"/proc/{process.pid}/statm").read_text().split()
            seen.append((time.perf_counter() - started, int(fields[1]) * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, IndexError):
            pass
        time.sleep(0.25)
    return seen


def write_pool(folder: Path) -> Path:
    """A file of random weights."""
    import torch

    pool = folder / "pool"
    noise = torch.randn(_POOL // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    pool.write_bytes(noise.view(torch.uint8).numpy().data)
    return pool


def watched(shape: str, blocks: int | None, pool: Path, out: Path) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """(the answer, (seconds, resident bytes) over time)."""
    command = [sys.executable, __file__, "--child", shape, "--work", str(out), "--pool", str(pool)]
    command += ["--blocks", str(blocks)] if blocks else []
    with tempfile.TemporaryFile("w+") as answer:
        seen = resident(subprocess.Popen(command, stdout=answer, stderr=subprocess.DEVNULL))
        answer.seek(0)
        found = json.loads(answer.read())
    shutil.rmtree(out)
    return found, seen


def copied(shape: str, blocks: int | None, pool: Path, to: Path) -> tuple[float, float]:
    """(bytes, seconds) of a plain copy."""
    done, started = 0, time.perf_counter()
    with open(to, "wb", buffering=0) as file:
        for piece in Shards(shape, blocks, pool).pieces(_COPIED):
            file.write(piece)
            done += len(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    to.unlink()
    return done, seconds


def plot(runs: list[dict[str, Any]]) -> str:
    """Resident memory over time, a line for each shape."""
    width, height, left, bottom = 720, 300, 60, 260
    colours = ("#1f6feb", "#b35900", "#2da44e")
    last = max(run["seen"][-1][0] for run in runs)
    out = []
    for mib in (0, 256, 512, 768, 1024):
        y = bottom - mib / 1024 * 230
        out.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.0f}" y2="{y:.0f}" stroke="#8888" stroke-width=".5"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{mib}</text>')
    for run, colour in zip(runs, colours, strict=False):
        xy = [(left + t / last * (width - left - 10), bottom - b / 2**30 * 230) for t, b in run["seen"]]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
        out.append(f'<polyline fill="none" stroke="{colour}" points="{line}"/>')
        at = f'x="{xy[-1][0]:.0f}" y="{min(y for _, y in xy) - 8:.0f}" text-anchor="end"'
        out.append(f'<text {at} fill="{colour}">{run["shape"]}</text>')
    out.append(f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">seconds, to {last:.0f}</text>')
    out.append('<text x="4" y="14">resident memory, MiB</text>')
    label = "Resident memory of conversions over time: " + ", ".join(
        f"{run['shape']} at most {run['peak'] / 2**20:.0f} MiB in {run['seconds']:.0f} s" for run in runs
    )
    style = "text{font:12px system-ui,sans-serif;fill:#57606a}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"<style>{style}</style>{''.join(out)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--pool", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        shards = Shards(args.child, args.blocks, args.pool)
        convert(shards, args.work, "--method", "rtn", "--max-memory", "1GiB")
    runs = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        pool = write_pool(Path(scratch))
        for shape in args.shapes:
            nbytes, seconds = copied(shape, args.blocks, pool, Path(scratch, "copy"))
            answer, seen = watched(shape, args.blocks, pool, Path(scratch, "out"))
            plan = answer["plan"]
            run = {
                "shape": shape, "source_bytes": plan["bytes_in"], "bytes_out": plan["bytes_out"],
                "seconds": answer["seconds_measured"], "copy_gbs": nbytes / seconds / 1e9,
                "predicted": plan["peak_memory_predicted_bytes"], "peak": answer["peak_memory_measured_bytes"],
                "seen": seen,
            }  # fmt: skip
            runs.append(run)
            sizes = f"{run['source_bytes'] / 1e9:.1f} GB -> {run['bytes_out'] / 1e9:.1f} GB"
            print(
                f"{shape}: {sizes} in {run['seconds']:.0f} s, "
                f"{run['source_bytes'] / run['seconds'] / 1e9:.2f} GB/s (a copy {run['copy_gbs']:.2f}); peak "
                f"{run['peak'] / 2**20:.0f} MiB, predicted {run['predicted'] / 2**20:.0f}",
                flush=True,
            )
    if args.plot:
        args.plot.write_text(plot(runs))
    if args.csv:
        lines = ["shape,source_bytes,bytes_out,seconds,copy_gbs,peak_predicted,peak_measured"]
        keys = ("shape", "source_bytes", "bytes_out", "seconds", "copy_gbs", "predicted", "peak")
        lines += [",".join(f"{run[k]:.4g}" if isinstance(run[k], float) else str(run[k]) for k in keys) for run in runs]
        args.csv.write_text("\n".join(lines) + "\n")
    print(json.dumps([{k: v for k, v in run.items() if k != "seen"} for run in runs]))


if __name__ == "__main__":
    main()
