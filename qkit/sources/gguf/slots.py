"""Which tensor of a GGUF file is which of a transformers model, and what sets their values apart."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Arch

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Slot:
    """One tensor of the transformers model and where it comes from.

    heads      rows are in ggml's RoPE order for that many heads; 0: as they are
    minus_one  stored as weight + 1
    expert     slice of the first dimension of the GGUF tensor
    """

    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    minus_one: bool = False
    expert: int | None = None


def slots(arch: Arch, config: Mapping[str, Any], stored: Container[str] | None) -> Iterator[tuple[str, Slot]]:
    """(transformers name, Slot) of every tensor the model has.

    stored: names of the tensors in a file that is read; None where one is to be written."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", Slot("token_embd.weight", (vocab, hidden))
    yield "model.norm.weight", Slot("output_norm.weight", (hidden,), minus_one=arch.gemma)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", Slot("output.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        if stored is not None and block + "attn_norm.weight" not in stored:
            # Stops a bogus block_count at the first missing layer.
            yield layer + "input_layernorm.weight", Slot(block + "attn_norm.weight", (hidden,))
            return
        for ours, slot in _norms(arch, config):
            yield layer + ours, Slot(block + slot.gguf, slot.shape, minus_one=arch.gemma)
        for ours, slot in _attention(arch, config):
            yield f"{layer}self_attn.{ours}", Slot(block + slot.gguf, slot.shape, slot.heads, slot.minus_one)
        feed_forward = _experts(arch, config, block, stored) if arch.experts else _mlp(config)
        for ours, slot in feed_forward:
            yield layer + ours, Slot(block + slot.gguf, slot.shape, expert=slot.expert)


def _norms(arch: Arch, config: Mapping[str, Any]) -> Iterator[tuple[str, Slot]]:
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if arch.gemma:
        names |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    for ours, gguf in names.items():
        yield f"{ours}.weight", Slot(f"{gguf}.weight", (config["hidden_size"],))


def _attention(arch: Arch, config: Mapping[str, Any]) -> Iterator[tuple[str, Slot]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv_bias = config.get("attention_bias", arch.model_type.startswith("qwen2"))
    for name, count, permuted in (("q", heads, True), ("k", kv_heads, True), ("v", kv_heads, False)):
        order = count if permuted and arch.permuted else 0
        yield f"{name}_proj.weight", Slot(f"attn_{name}.weight", (count * dim, hidden), order)
        if qkv_bias:
            yield f"{name}_proj.bias", Slot(f"attn_{name}.bias", (count * dim,), order)
    yield "o_proj.weight", Slot("attn_output.weight", (hidden, heads * dim))
    if config.get("attention_bias"):
        yield "o_proj.bias", Slot("attn_output.bias", (hidden,))
    if arch.qk_norm:
        for name in "qk":
            yield f"{name}_norm.weight", Slot(f"attn_{name}_norm.weight", (dim,), minus_one=arch.gemma)


def _mlp(config: Mapping[str, Any]) -> Iterator[tuple[str, Slot]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield f"mlp.{name}_proj.weight", Slot(f"ffn_{name}.weight", shape)
        if config.get("mlp_bias"):
            yield f"mlp.{name}_proj.bias", Slot(f"ffn_{name}.bias", shape[:1])


def _experts(
    arch: Arch, config: Mapping[str, Any], block: str, stored: Container[str] | None
) -> Iterator[tuple[str, Slot]]:
    """Router and experts. Files hold all experts of a layer in one tensor, old Mixtral ones an expert each."""
    mixtral = arch.model_type == "mixtral"
    hidden, count = config["hidden_size"], config["num_local_experts" if mixtral else "num_experts"]
    width = config["intermediate_size" if mixtral else "moe_intermediate_size"]
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {k: f"{k}_proj" for k in ("gate", "up", "down")}
    yield f"{arch.experts}.gate.weight", Slot("ffn_gate_inp.weight", (count, hidden))
    merged = stored is None or f"{block}ffn_gate_exps.weight" in stored or f"{block}ffn_gate.0.weight" not in stored
    for kind, ours in names.items():
        shape = (hidden, width) if kind == "down" else (width, hidden)
        for e in range(count):
            slot = Slot(f"ffn_{kind}_exps.weight", shape, expert=e) if merged else Slot(f"ffn_{kind}.{e}.weight", shape)
            yield f"{arch.experts}.experts.{e}.{ours}.weight", slot
    if arch.shared_expert:
        width = config["shared_expert_intermediate_size"]
        yield f"{arch.experts}.shared_expert_gate.weight", Slot("ffn_gate_inp_shexp.weight", (1, hidden))
        for kind in ("gate", "up", "down"):
            shape = (hidden, width) if kind == "down" else (width, hidden)
            yield f"{arch.experts}.shared_expert.{kind}_proj.weight", Slot(f"ffn_{kind}_shexp.weight", shape)
