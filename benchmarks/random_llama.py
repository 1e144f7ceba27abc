"""A Llama-shaped model with random weights, the same values in every engine's format.

    python benchmarks/random_llama.py OUT [--layers 32] [--hidden 4096] [--intermediate 14336] [--heads 32]
        [--kv-heads 8] [--vocab 128256] [--head w4|bf16] [--group 128] [--only w4a16 bf16 q4_0]

Writes OUT/w4a16 (compressed-tensors, 4 bits symmetric, in groups), OUT/bf16 (safetensors) and OUT/q4_0.gguf
(llama.cpp; needs the gguf package). The default shape is Llama-3.1-8B's. No tokenizer: engines are given token ids.

Every matrix is codes 1..15 minus 8 times a scale for each group of inputs, and the scale has four significant bits: the
product is exact in bfloat16, the scale in float16, and blocks of 32 with the same scale are one group. So the three
files hold the same numbers. --head: how the output head is stored; the embedding, of which a token reads one
row, is bfloat16, or Q4_0 in the GGUF. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qkit import formats, kernels
from qkit.kernels.codes import weight_of
from qkit.spec import integer
from qkit.spec.dtypes import TensorMeta
from qkit.storage.local import LocalStore
from qkit.storage.writer import write_safetensors

LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Module -> [out, in], in the order of the files."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    outs = (hidden, kv, kv, hidden, wide, wide, hidden)
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, out in zip(LAYER, outs, strict=True):
            shapes[f"model.layers.{i}.{name}"] = (out, wide if name == "mlp.down_proj" else hidden)
    return shapes | {"lm_head": (config["vocab_size"], hidden)}


def norms(config: dict[str, Any]) -> list[str]:
    layers = range(config["num_hidden_layers"])
    both = ("input_layernorm", "post_attention_layernorm")
    return [f"model.layers.{i}.{name}" for i in layers for name in both] + ["model.norm"]


def weight(module: str, shape: tuple[int, int], group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [out, in] of 1..15, scale bfloat16 [out, in / group]), the same at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
    out, in_ = shape
    codes = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
    # A deviation of about 1 / sqrt(in): uniform codes deviate by 4.3 from their middle, mantissas average 1.5.
    exponent = round(math.log2(1 / (4.3 * 1.5 * math.sqrt(in_))))
    eighths = torch.randint(8, 16, (out, in_ // group), generator=generator)
    return codes, (eighths.float() / 8 * 2.0**exponent).to(torch.bfloat16)


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 [out, in], exactly."""
    packed = kernels.pack(codes, 4)
    return kernels.dequantize(packed, scale, None, 4, codes.shape[1], torch.bfloat16)


def write_folder(folder: Path, config: dict[str, Any], packed: set[str], group: int) -> None:
    """A safetensors folder whose modules in `packed` are compressed-tensors, the others bfloat16."""
    fmt, scheme = formats.get("compressed-tensors"), integer(4, group)
    shapes = matrices(config)
    entries: list[tuple[str, TensorMeta]] = []
    for module, shape in shapes.items():
        if module in packed:
            entries += [(f"{module}.{local}", meta) for local, meta in fmt.out_metas(shape, scheme).items()]
        else:
            entries.append((f"{module}.weight", TensorMeta("BF16", shape)))
    entries += [(f"{name}.weight", TensorMeta("BF16", (config["hidden_size"],))) for name in norms(config)]

    def tensors() -> Iterator[torch.Tensor]:
        for module, shape in shapes.items():
            codes, scale = weight(module, shape, group)
            if module in packed:
                made = fmt.pack(weight_of(codes, scale, None, 4))
                yield from (made[local] for local in fmt.out_metas(shape, scheme))
            else:
                yield dense(codes, scale)
        for _ in norms(config):
            yield torch.ones(config["hidden_size"], dtype=torch.bfloat16)

    folder.mkdir(parents=True)
    write_safetensors(LocalStore(folder), "model.safetensors", entries, tensors())
    written = dict(config)
    if packed:
        ignored = [] if "lm_head" in packed else ["lm_head"]
        schemes = {module: scheme for module in shapes if module in packed}
        written["quantization_config"] = fmt.config(schemes, ignored, {})
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def q4_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """ggml's Q4_0, uint8 [out, in / 32 * 18]: float16 scale, then byte j holds elements j (low) and j + 16."""
    out, in_ = codes.shape
    blocks = codes.view(out, in_ // 32, 2, 16)
    data = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
    scales = (
        scale.to(torch.float16).repeat_interleave(in_ // 32 // scale.shape[1], dim=1).contiguous().view(torch.uint8)
    )
    return torch.cat([scales.view(out, in_ // 32, 2), data], dim=-1).view(out, -1)


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """q and k as llama.cpp rotates them: the two halves of each head's rows take turns."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def write_gguf(path: Path, config: dict[str, Any], head: str, group: int) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def name_of(module: str) -> str:
        parts = module.split(".")
        if parts[1:2] == ["layers"]:
            return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.weight"
        return f"{GGUF_NAMES[module]}.weight"

    shapes = matrices(config)
    for module, (out, in_) in shapes.items():
        if module == "lm_head" and head == "bf16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(name_of(module), (out, in_ * 2), np.dtype(np.uint8), out * in_ * 2, kind)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            row = in_ // 32 * 18
            writer.add_tensor_info(name_of(module), (out, row), np.dtype(np.uint8), out * row, kind)
    for name in norms(config):
        hidden = config["hidden_size"]
        writer.add_tensor_info(name_of(name), (hidden,), np.dtype(np.float32), hidden * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for module, shape in shapes.items():
        codes, scale = weight(module, shape, group)
        if module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            codes, scale = interleave(codes, heads), interleave(scale, heads)
        if module == "lm_head" and head == "bf16":
            writer.write_tensor_data(dense(codes, scale).view(torch.uint8).numpy())
        else:
            writer.write_tensor_data(q4_0(codes, scale).numpy())
    for _ in norms(config):
        writer.write_tensor_data(np.ones(config["hidden_size"], dtype=np.float32))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--head", choices=("w4", "bf16"), default="bf16")
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=128, help="inputs that share a scale")
    parser.add_argument("--only", nargs="+", choices=("w4a16", "bf16", "q4_0"), default=("w4a16", "bf16", "q4_0"))
    args = parser.parse_args()
    if args.hidden % args.group or args.intermediate % args.group or args.hidden % args.heads:
        parser.error(f"--hidden and --intermediate must be multiples of {args.group}, --hidden of --heads")
    config = config_of(args)
    packed = {module for module in matrices(config) if module.startswith("model.layers.")}
    packed |= {"lm_head"} if args.head == "w4" else set()
    sizes = {}
    for kind in args.only:
        path = args.out / (f"{kind}.gguf" if kind == "q4_0" else kind)
        if path.is_dir():
            shutil.rmtree(path)
        args.out.mkdir(parents=True, exist_ok=True)
        if kind == "q4_0":
            write_gguf(path, config, args.head, args.group)
        else:
            write_folder(path, config, packed if kind == "w4a16" else set(), args.group)
        files = path.iterdir() if path.is_dir() else [path]
        sizes[str(path)] = sum(f.stat().st_size for f in files)
        print(f"{path}: {sizes[str(path)] / 1e9:.2f} GB", file=sys.stderr)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
