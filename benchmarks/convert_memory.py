"""Peak memory of conversions, predicted by the plan against measured on the process.

    python benchmarks/convert_memory.py [--only NAME ...] [--method rtn gptq]
    python benchmarks/convert_memory.py --only block --formats

Llama-shaped random bfloat16 checkpoints from small to one block of Llama-3.1-8B with its embeddings; each conversion in
a process of its own. "ratio" is measured / predicted. `--formats`: by rounding, to the schemes of all formats. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from byte_tokenizer import write_tokenizer

# name -> hidden, intermediate, KV width, layers, vocabulary, calibration windows x tokens
SHAPES = {
    "tiny": (256, 768, 128, 2, 1000, 8, 128),
    "small": (1024, 4096, 256, 4, 32000, 16, 256),
    "wide-head": (1024, 3072, 256, 2, 151936, 16, 256),
    "many-tokens": (1024, 3072, 512, 2, 32000, 64, 1024),
    "medium": (2048, 8192, 512, 3, 32000, 16, 512),
    "block": (4096, 14336, 1024, 1, 32000, 8, 512),
    "8b-block": (4096, 14336, 1024, 1, 128256, 8, 512),
}


def make_checkpoint(folder: Path, hidden: int, wide: int, kv: int, layers: int, vocab: int) -> None:
    import torch

    from qkit.spec.dtypes import TensorMeta
    from qkit.storage.local import LocalStore
    from qkit.storage.writer import write_safetensors

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + "self_attn." + n: s for n, s in (("q_proj", (hidden, hidden)), ("k_proj", (kv, hidden)),
                   ("v_proj", (kv, hidden)), ("o_proj", (hidden, hidden)))}  # fmt: skip
        shapes |= {layer + "mlp." + n: (wide, hidden) for n in ("gate_proj", "up_proj")}
        shapes |= {layer + "mlp.down_proj": (hidden, wide)}
        shapes |= {layer + n: (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    noise = torch.randn(max(wide, vocab) * hidden, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    entries = [(f"{name}.weight", TensorMeta("BF16", shape)) for name, shape in shapes.items()]
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = (ones if len(m.shape) == 1 else noise[: m.numel].view(m.shape) for _, m in entries)
    folder.mkdir(parents=True)
    write_safetensors(LocalStore(folder), "model.safetensors", entries, tensors)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv // 64, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


# format -> schemes of its own that differ in how they are computed
SCHEMES = {
    "compressed-tensors": ("w4a16", "w4a16-asym", "w8a16", "w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16"),
    "gptq": ("w4a16", "w3a16", "w8a16"),
    "awq": ("w4a16-asym",),
    "bnb": ("nf4", "nf4-dq", "fp4", "int8"),
    "gguf": ("q4_0", "q4_k_m", "q6_k", "q8_0", "iq4_xs", "bf16", "f16"),
    "safetensors": ("none",),
}


def convert(
    source: Path, out: Path, method: str, samples: int, length: int, asked: tuple[str, ...] = ()
) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "qkit",
        "convert",
        str(source),
        "-o",
        str(out),
        "--method",
        method,
        "--json",
        *asked,
    ]
    if method != "rtn":
        command += ["--calib-samples", str(samples), "--calib-len", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": done.stderr.strip().splitlines()[-2:]}
    result = json.loads(done.stdout)
    predicted, measured = result["plan"]["peak_memory_predicted_bytes"], result["peak_memory_measured_bytes"]
    return {
        "predicted": predicted,
        "measured": measured,
        "ratio": measured / predicted,
        "seconds": result["seconds_measured"],
        "workers": result["plan"]["workers"],
    }


def show(row: dict[str, Any]) -> str:
    name = f"{row['shape']:12} {row['method']:5} {row.get('format', ''):30}".rstrip()
    if "refused" in row:
        return f"{name} {' '.join(row['refused'])}"
    predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
    return (
        f"{name} predicted {predicted:7.0f} MiB, measured {measured:7.0f} MiB, ratio {row['ratio']:.2f}, "
        f"{row['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--formats", action="store_true")
    args = parser.parse_args()
    every = [(f"{fmt} {scheme}", ("--format", fmt, "--scheme", scheme)) for fmt, of in SCHEMES.items() for scheme in of]
    runs = [(method, "", ()) for method in args.method] if not args.formats else [("rtn", *each) for each in every]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            *shape, samples, length = SHAPES[name]
            source = Path(scratch, name)
            make_checkpoint(source, *shape)
            for method, label, asked in runs:
                row = {"shape": name, "method": method} | ({"format": label} if label else {})
                out = Path(scratch, f"{name}-{method}")
                row |= convert(source, out, method, samples, length, asked)
                rows.append(row)
                print(show(row), flush=True)
                shutil.rmtree(out, ignore_errors=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
