"""Tiny random models, saved as ordinary checkpoints: what the tests convert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
# Families whose files have all experts of a layer in one tensor; the others do where transformers saves them with
# save_original_format=False.
FUSED: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    save_original_format: bool = True,
    **changes: Any,
) -> Path:
    """A random model of `family` with a byte-level tokenizer, saved under `folder` as safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**TINY, **(FAMILIES | FUSED)[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    model.save_pretrained(
        folder, max_shard_size=changes.get("max_shard_size", "5GB"), save_original_format=save_original_format
    )
    make_tokenizer(folder)
    return folder


def with_nan(model: Path, folder: Path, name: str, at: tuple[int, int]) -> Path:
    """A copy of a checkpoint of one file, in which one value of a tensor is not a number."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_tokenizer(folder: Path) -> None:
    """256 bytes and three special tokens; every text is encodable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "add_bos_token": False,
            }
        )
    )
