"""Our GGUF encoders against llama.cpp's own: what is lost, KL divergence, speed. The last line is one JSON document.

    python benchmarks/gguf_quantize.py --llama PYTHON --errors
    python benchmarks/gguf_quantize.py --llama PYTHON --kl SOURCE --text wiki.test.raw --calib c4.utf8
    python benchmarks/gguf_quantize.py --llama PYTHON --speed [--layers 4]

PYTHON: of an environment with llama-cpp-python (`python tests/interop/clients.py llamacpp` makes one and prints it).

errors  relative error of each block type on one random matrix
kl      of `qkit convert SOURCE --format gguf` for each mix, with and without an importance matrix, against the same
        types from llama.cpp's `ggml_quantize_chunk`, with the same importances; scored as llama.cpp does and at every
        position
speed   `qkit convert --method rtn --no-verify` of layers of Llama-3.1-8B's shape, reading bfloat16 safetensors, against
        `llama_model_quantize` of the same values in a bfloat16 GGUF file; whole calls, in turns, twice
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qkit
from qkit.calibrate.observe import read_moments
from qkit.kernels import ggml
from qkit.measure.quality import compare, model_logits
from qkit.sources import open_source
from qkit.sources.gguf import GgufFile
from qkit.sources.gguf.config import find_arch
from qkit.sources.gguf.slots import slots
from qkit.spec.dtypes import TensorMeta
from qkit.spec.ggml import GGML
from qkit.storage.local import LocalStore
from qkit.storage.writer import write_safetensors
from qkit.text.tokenizer import load_tokenizer

MIXES = ("q4_0", "q4_k_m", "q6_k", "iq4_xs")
QUANTIZE = """
import ctypes, json, sys, time, llama_cpp
source, out, ftype = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(ftype), 2
started = time.perf_counter()
assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) == 0
print(json.dumps(time.perf_counter() - started))
"""


class Theirs:
    """ggml's own quantizers, by name of the type."""

    def __init__(self, python: str):
        site = Path(python).parent.parent
        (path,) = site.glob("lib/python3*/site-packages/llama_cpp/lib/libggml-base.so")
        self.quantize = ctypes.CDLL(str(path)).ggml_quantize_chunk
        p, n = ctypes.c_void_p, ctypes.c_int64
        self.quantize.argtypes, self.quantize.restype = [ctypes.c_int, p, p, n, n, n, p], ctypes.c_size_t

    def __call__(self, w: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        x = w.float().contiguous()
        out = torch.empty(x.shape[0], GGML[name].row_bytes(x.shape[1]), dtype=torch.uint8)
        weight = None if importance is None else importance.float().contiguous()
        pointer = None if weight is None else weight.data_ptr()
        self.quantize(GGML[name].number, x.data_ptr(), out.data_ptr(), 0, *x.shape, pointer)
        return out


def values(raw: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    out = torch.empty(shape)
    ggml.dequantize(raw.view(-1), GGML[name], out.view(-1))
    return out


def errors(theirs: Theirs) -> dict[str, list[float]]:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ggml.GRIDS:
        lost = [
            float((values(encode(x, name, None), name, x.shape) - x).norm() / x.norm())
            for encode in (ggml.encode, theirs)
        ]
        found[name] = [round(e, 5) for e in lost]
        print(f"{name:7s} qkit {lost[0]:.5f}  llama.cpp {lost[1]:.5f}", file=sys.stderr)
    return found


def kl(theirs: Theirs, source: str, text: str, calib: str, work: Path, chunks: int, mixes: list[str]) -> dict[str, Any]:
    opened = open_source(source)
    tokenizer = load_tokenizer(opened)
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False).input_ids
    tokens = torch.tensor(ids[: chunks * 512]).view(chunks, 512)
    if opened.config["model_type"].startswith("gemma"):
        tokens[:, 0] = tokenizer.bos_token_id
    base, model = (qkit.load(source, device="cpu", dtype="bfloat16") for _ in range(2))

    def score(tensors: dict[str, torch.Tensor]) -> list[float]:
        own = model.state_dict()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        found = compare(model_logits(base, tokens), model_logits(model, tokens), tokens)
        figures = [s.against.kld for s in found.protocols.values() if s.against is not None]
        return [round(f.value, 4) for f in figures] + [round(f.error, 4) for f in figures]

    found: dict[str, Any] = {}
    for mix in mixes:
        for method in ("rtn", "imatrix"):
            out = work / f"{mix}-{method}"
            more = {"calib": calib, "calib_samples": 64, "calib_len": 512} if method == "imatrix" else {}
            qkit.convert(source, out, format="gguf", scheme=mix, method=method, **more)
            (path,) = out.glob("*.gguf")
            file = GgufFile(path)
            moments = read_moments(LocalStore(out), "imatrix.safetensors") if method == "imatrix" else {}
            made = open_source(str(out))
            _, arch = find_arch(file.metadata, path)
            ours, other = {}, {}
            for name, slot in slots(arch, made.config, file.tensors):
                kind = file.tensors[slot.gguf].type
                if kind.plain or slot.expert is not None:
                    continue
                w = opened.read(name)
                importance = moments[name].square if name in moments else None
                ours[name] = made.read(name)
                other[name] = values(theirs(w, kind.name, importance), kind.name, w.shape)
            row = {"MB": round(path.stat().st_size / 1e6, 1), "qkit": score(ours), "llama.cpp": score(other)}
            found[f"{mix} {method}"] = row
            print(mix, method, json.dumps(row), file=sys.stderr, flush=True)
    return found


def make(folder: Path, layers: int) -> Path:
    """Layers of Llama-3.1-8B's shape with a vocabulary of bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from models import make_tokenizer

    hidden, wide, kv = 4096, 14336, 1024
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 512, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    entries = [("model.embed_tokens.weight", TensorMeta("BF16", (512, hidden)))]
    entries += [
        (f"model.layers.{i}.{name}.weight", TensorMeta("BF16", shape))
        for i in range(layers)
        for name, shape in shapes.items()
    ]
    entries += [
        ("model.norm.weight", TensorMeta("BF16", (hidden,))),
        ("lm_head.weight", TensorMeta("BF16", (512, hidden))),
    ]
    noise = torch.randn(wide * hidden, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = (noise[: m.numel].view(m.shape) for _, m in entries)
    write_safetensors(LocalStore(folder), "model.safetensors", entries, tensors)
    make_tokenizer(folder)
    return folder


def speed(python: str, work: Path, layers: int) -> dict[str, list[float]]:
    from qkit.formats.gguf.mixes import MIXES as NUMBERS

    source = make(work / "source", layers)
    (exported,) = qkit.convert(source, work / "bf16", format="gguf", scheme="none").out.glob("*.gguf")
    exported.read_bytes()
    found: dict[str, list[float]] = {}
    for turn in range(2):
        for mix in MIXES:
            started = time.perf_counter()
            out = work / f"{mix}-{turn}"
            qkit.convert(source, out, format="gguf", scheme=mix, method="rtn", verify=False)
            ours = time.perf_counter() - started
            command = [python, "-c", QUANTIZE, str(exported), str(work / "theirs.gguf"), str(NUMBERS[mix][1])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            theirs = float(done.stdout.splitlines()[-1])
            found.setdefault(mix, []).extend([round(ours, 2), round(theirs, 2)])
            print(f"{mix}: qkit {ours:.2f} s, llama.cpp {theirs:.2f} s, {theirs / ours:.2f} times", file=sys.stderr)
            for file in out.iterdir():
                file.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", required=True)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--kl")
    parser.add_argument("--text")
    parser.add_argument("--calib")
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), help="of --kl")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 tokens that are scored")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.errors:
            result["errors"] = errors(Theirs(args.llama))
        if args.kl:
            result["kl"] = kl(Theirs(args.llama), args.kl, args.text, args.calib, Path(folder), args.chunks, args.mixes)
        if args.speed:
            result["speed"] = speed(args.llama, Path(folder), args.layers)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
