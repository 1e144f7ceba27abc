"""GGUF files for the tests: tiny transformers models written with the `gguf` package, forward conversion done here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K into ggml's RoPE order, by explicit index: neighbours from the two halves of a head."""
    dim = len(weight) // heads
    order = [h * dim + i + half * (dim // 2) for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return weight[order]


def convert(state: dict[str, torch.Tensor], config: Any, arch: str) -> dict[str, np.ndarray]:
    """transformers tensors under GGUF names, in float32."""
    names = NAMES | GEMMA if arch == "gemma3" else NAMES
    result: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state.items():
        tensor = tensor.float()
        stem, suffix = name.rsplit(".", 1)
        if arch == "gemma3" and "norm" in stem:
            tensor = tensor + 1
        if stem in TOP:
            result[f"{TOP[stem]}.{suffix}"] = tensor.numpy()
            continue
        _, _, layer, rest = stem.split(".", 3)
        if ".experts." in rest:
            _, _, number, kind = rest.split(".")
            kind = {"w1": "gate", "w3": "up", "w2": "down"}.get(kind, kind.removesuffix("_proj"))
            experts.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", {})[int(number)] = tensor
            continue
        if arch == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            q = rest.endswith("q_proj")
            tensor = permute(tensor, config.num_attention_heads if q else config.num_key_value_heads)
        if rest == "mlp.shared_expert_gate":
            tensor = tensor.flatten()
        result[f"blk.{layer}.{names[rest]}.{suffix}"] = tensor.numpy()
    for name, parts in experts.items():
        result[name] = torch.stack([parts[i] for i in range(len(parts))]).numpy()
    return result


def write(
    path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, Any], vocab: dict[str, Any] | None = None
) -> Path:
    """A GGUF file. keys are under `{arch}.`; vocab under `tokenizer.ggml.`, default a byte-level one that fits."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        add(writer, f"{arch}.{key}", value)
    rows = len(tensors["token_embd.weight"])
    for key, value in (vocab or byte_vocab(rows)).items():
        add(writer, f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            data, kind = tensor
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_vocab(rows: int) -> dict[str, Any]:
    """The 256 byte tokens, then <|end|>; `rows` at least 257 in the embedding, or fewer bytes."""
    tokens = [*BYTES[: min(256, rows - 1)], "<|end|>"]
    return {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * (len(tokens) - 1) + [3],
        "merges": ["a b"], "eos_token_id": len(tokens) - 1, "bos_token_id": len(tokens) - 1,
    } | ({"merges": ["! !"], "tokens": [*tokens[:-2], "!!", "<|end|>"]})  # fmt: skip


def base_keys(config: Any) -> dict[str, Any]:
    """The metadata every architecture has."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
