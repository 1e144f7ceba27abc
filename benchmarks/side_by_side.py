"""Rounding one large checkpoint to 4 bits: qkit, its peers and a plain copy, in turns in one run.

    python benchmarks/side_by_side.py [--shape 8b] [--blocks N] [--rounds 2] [--work DIR] [--peer NAME=PYTHON ...]

The checkpoint: a Llama of that shape with random bfloat16 weights, in files of 5 GB, as the Hub has them (`--blocks`:
fewer decoder blocks). Peers run in Pythons of their own: llm-compressor (`model_free_ptq`, W4A16, one worker and two),
AutoRound (its model-free mode, W4A16) and llama.cpp (llama_model_quantize of a BF16 GGUF to Q4_0, two threads;
qkit's Q4_0 of the same file beside it). Each run is a process of its own, after `sync`, and where this user may,
with an empty page cache; its result is removed. Seconds are the whole process, start to end, and the sync of what it
wrote; memory is its peak resident set, of which `anonymous` does not count pages of mapped files. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import write_tokenizer
from large_models import SHAPES, config_of, tensors_of

HERE = Path(__file__).parent
_FILE = 5e9  # bytes of a file of weights


def make_checkpoint(folder: Path, shape: str, blocks: int | None) -> int:
    """Returns bytes of weights."""
    import torch

    from qkit.spec.dtypes import TensorMeta
    from qkit.storage.local import LocalStore
    from qkit.storage.writer import write_safetensors

    folder.mkdir()
    noise = torch.randn(1 << 28, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: list[list[tuple[str, TensorMeta]]] = [[]]
    for tensors in tensors_of(shape, blocks):
        for name, size in tensors.items():
            if sum(meta.nbytes for _, meta in files[-1]) > _FILE:
                files.append([])
            files[-1].append((name, TensorMeta("BF16", size)))

    def drawn(meta: TensorMeta) -> Any:
        whole = torch.empty(meta.numel, dtype=torch.bfloat16)
        for at in range(0, meta.numel, len(noise)):
            whole[at : at + len(noise)] = noise[: meta.numel - at]
        return whole.view(meta.shape)

    index = {}
    for i, entries in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(LocalStore(folder), name, entries, (drawn(meta) for _, meta in entries))
        index |= {tensor: name for tensor, _ in entries}
    total = sum(meta.nbytes for entries in files for _, meta in entries)
    config = config_of(shape, blocks)
    (folder / "config.json").write_text(json.dumps(config))
    stated = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stated))
    write_tokenizer(folder, config["vocab_size"])
    return total


def peak_of(pid: int, seen: dict[str, int], ended: threading.Event) -> None:
    """Keep the largest resident set of a process and its children, and the anonymous part of it."""
    while not ended.wait(0.1):
        resident = anonymous = 0
        for each in [str(pid), *children_of(pid)]:
            with suppress(OSError, ValueError, IndexError, KeyError):
                lines = Path("/proc", each, "status").read_text().splitlines()
                found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
                resident += sum(found.values())
                anonymous += found["RssAnon"]
        seen["resident"] = max(seen["resident"], 1024 * resident)
        seen["anonymous"] = max(seen["anonymous"], 1024 * anonymous)


def children_of(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += (task / "children").read_text().split()
    return [each for child in found for each in (child, *children_of(int(child)))]


def timed(command: list[str], out: Path) -> dict[str, Any]:
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    seen, ended = {"resident": 0, "anonymous": 0}, threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | QUIET)
        watch = threading.Thread(target=peak_of, args=(process.pid, seen, ended))
        watch.start()
        code = process.wait()
        os.sync()
        seconds = time.perf_counter() - started
        ended.set()
        watch.join()
        said.seek(0)
        tail = said.read()[-2000:]
    nbytes = sum(p.stat().st_size for p in ([out] if out.is_file() else out.rglob("*")) if p.is_file())
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
    return {"seconds": seconds, "bytes_out": nbytes, **seen} if code == 0 else {"failed": tail}


QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def contenders(source: Path, gguf: Path, out: Path, peers: dict[str, str]) -> dict[str, list[str]]:
    """Name -> command. llama.cpp's, and ours beside it, read the GGUF."""
    ours = [sys.executable, "-m", "qkit", "convert"]
    to = ["-o", str(out), "--method", "rtn"]
    found = {
        "plain copy": ["cp", "-r", str(source), str(out)],
        "qkit": [*ours, str(source), *to],
        "qkit, not verified": [*ours, str(source), *to, "--no-verify"],
    }
    if python := peers.get("llm-compressor"):
        script = str(HERE / "peers" / "llmcompressor_model_free.py")
        for workers in ("1", "2"):
            found[f"llm-compressor, {workers} at a time"] = [
                python, script, str(source), str(out), "--workers", workers,
            ]  # fmt: skip
    if python := peers.get("AutoRound"):
        found["AutoRound"] = [python, str(HERE / "peers" / "autoround_model_free.py"), str(source), str(out)]
    if python := peers.get("llama.cpp"):
        found["qkit, GGUF Q4_0"] = [*ours, str(gguf), *to, "--format", "gguf", "--scheme", "q4_0"]
        script = str(HERE / "peers" / "llamacpp_quantize.py")
        found["llama.cpp Q4_0"] = [python, script, str(gguf), f"{out}.gguf", "--type", "Q4_0"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    args = parser.parse_args()
    peers = dict(each.split("=", 1) for each in args.peer)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        source, out = Path(scratch, "model"), Path(scratch, "out")
        nbytes = make_checkpoint(source, args.shape, args.blocks)
        print(f"{args.shape}: {nbytes / 1e9:.1f} GB", flush=True)
        all_of_them = contenders(source, Path(scratch, "bf16", "model.gguf"), out, peers)
        from_gguf = {name: command for name, command in all_of_them.items() if "Q4_0" in name}
        for kind in ("files", "gguf"):
            chosen = from_gguf if kind == "gguf" else {n: c for n, c in all_of_them.items() if n not in from_gguf}
            if kind == "gguf" and chosen:
                plain = ["--format", "gguf", "--scheme", "bf16", "--method", "rtn", "--no-verify"]
                whole = Path(scratch, "bf16")
                command = [sys.executable, "-m", "qkit", "convert", str(source), "-o", str(whole), *plain]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                next(whole.glob("*.gguf")).rename(whole / "model.gguf")
                shutil.rmtree(source)
            for _ in range(args.rounds):
                for name, command in chosen.items():
                    to = Path(f"{out}.gguf") if name.startswith("llama.cpp") else out
                    row = {"name": name, **timed(command, to)}
                    rows.append(row)
                    print(show(row, nbytes), flush=True)
    print(json.dumps(rows))


def show(row: dict[str, Any], nbytes: int) -> str:
    if "failed" in row:
        return f"{row['name']}: failed: {row['failed']}"
    return (
        f"{row['name']:32} {row['seconds']:7.1f} s, {nbytes / row['seconds'] / 1e9:.2f} GB/s, "
        f"{row['resident'] / 2**20:.0f} MiB ({row['anonymous'] / 2**20:.0f} anonymous), {row['bytes_out'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
