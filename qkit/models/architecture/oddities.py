"""What single families have that no table says: orders of layers, widths, tables of positions, layers of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import QkitError
from . import kinds
from .attention import grouped, head_dim, heads
from .keys import Keys
from .mlp import dense, mixture
from .part import Part, Place, linears
from .types import Cache, Matrix

if TYPE_CHECKING:
    from .family import Family

Outside = tuple[tuple[Matrix, ...], int]


# Heads, norms and widths.


def one_or_all(k: Keys) -> int:
    """GPT-BigCode: one KV head, or as many as there are heads."""
    return 1 if k.flag("multi_query", True) else k.size("num_attention_heads")


def falcon_heads(k: Keys) -> int:
    if k.flag("new_decoder_architecture"):
        return k.size("num_key_value_heads", k.size("num_attention_heads"))
    return one_or_all(k)


def falcon_norms(k: Keys) -> int:
    """Side by side, attention and MLP share a norm unless the new architecture has two."""
    if k.flag("new_decoder_architecture"):
        return k.size("num_ln_in_parallel_attn", 2)
    return 1 if k.flag("parallel_attn", True) else 2


def stablelm_norms(k: Keys) -> int:
    return 1 if k.flag("use_parallel_residual") else 2


def halved(k: Keys, at: Place) -> int:
    """RecurrentGemma counts gate and up together."""
    return max(1, k.size("intermediate_size") // 2)


def rounded(k: Keys, at: Place) -> int:
    """LFM2: two thirds, times a factor, up to a multiple."""
    width = k.size("intermediate_size")
    if not k.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(k.number("block_ffn_dim_multiplier", 1.0) * (2 * width // 3))
    to = k.size("block_multiple_of", 256)
    return max(to, -(-width // to) * to)


def expanded(k: Keys, at: Place) -> int:
    """MPT."""
    return k.size("expansion_ratio", 4) * k.size("hidden_size")


# Orders of layers.


def jamba_layers(k: Keys, layers: int) -> list[str]:
    period, offset = k.size("attn_layer_period"), k.size("attn_layer_offset", least=0)
    return [kinds.FULL if index % period == offset else kinds.LINEAR for index in range(layers)]


def bamba_layers(k: Keys, layers: int) -> list[str]:
    listed = k.listed("attn_layer_indices") or []
    return [kinds.FULL if index in listed else kinds.LINEAR for index in range(layers)]


def lfm2_layers(k: Keys, layers: int) -> list[str]:
    listed = k.listed("full_attn_idxs")
    return [kinds.FULL if listed is None or index in listed else "conv" for index in range(layers)]


def hybrid(k: Keys, layers: int) -> list[str]:
    return ["hybrid"] * layers


def zamba_layers(k: Keys, layers: int) -> list[str]:
    found = kinds.given(k, "layers_block_type", layers)
    if found is None:
        raise QkitError("layers_block_type is missing in config.json", "check config.json, or its origin")
    return found


def griffin_layers(k: Keys, layers: int) -> list[str]:
    """RecurrentGemma's: a pattern, repeated."""
    pattern = k.listed("block_types") or ["recurrent", "recurrent", "attention"]
    named = {"recurrent": kinds.LINEAR, "attention": kinds.SLIDING}
    if not all(isinstance(name, str) and name in named for name in pattern):
        raise QkitError(f"block_types in config.json has another word than {', '.join(named)}", "check config.json")
    return [named[pattern[index % len(pattern)]] for index in range(layers)]


def nemotron_layers(k: Keys, layers: int) -> list[str]:
    """Nemotron-H's pattern: M Mamba-2, * attention, - an MLP, E experts."""
    pattern = k.get("hybrid_override_pattern")
    if pattern is None:
        found = kinds.given(k, "layers_block_type", layers)
        if found is None:
            raise QkitError("hybrid_override_pattern is missing in config.json", "check config.json, or its origin")
        return found
    named = {"M": kinds.LINEAR, "*": kinds.FULL, "-": "mlp", "E": "moe"}
    if not isinstance(pattern, str) or len(pattern) < layers or not set(pattern) <= set(named):
        raise QkitError(
            f"hybrid_override_pattern in config.json does not describe {layers} layers in M, *, - and E",
            "check config.json",
        )
    return [named[letter] for letter in pattern[:layers]]


def kimi_layers(k: Keys, layers: int) -> list[str]:
    """Kimi Linear's: listed from 1 up, or every fourth."""
    listed = k.nested("linear_attn_config").listed("full_attn_layers")
    if listed is not None:
        return [kinds.FULL if index + 1 in listed else kinds.LINEAR for index in range(layers)]
    return [kinds.FULL if index and index % 4 == 0 else kinds.LINEAR for index in range(layers)]


def mllama_layers(k: Keys, layers: int) -> list[str]:
    listed = k.listed("cross_attention_layers")
    crossing = [3, 8, 13, 18, 23, 28, 33, 38] if listed is None else listed
    return ["cross_attention" if index in crossing else kinds.FULL for index in range(layers)]


# Layers of their own.


def local_attention(k: Keys, f: Family, at: Place) -> Part:
    """RecurrentGemma's, whose window has another name."""
    window = k.size("attention_window_size")
    own = Keys({**k.config, "sliding_window": window, "head_dim": None}, k.model_type, k.where)
    return grouped(own, f, at)


def bare_mlp(k: Keys, f: Family, at: Place) -> Part:
    return dense(k, f, at)


def bare_moe(k: Keys, f: Family, at: Place) -> Part:
    """Nemotron-H's experts, which may work on a narrower state."""
    if f.moe is None:
        raise QkitError(f"layer {at.index} in config.json is one of experts, which this family has not")
    narrow = k.size("moe_latent_size", 0, least=0)
    if not narrow:
        return mixture(k, f, f.moe, at)
    hidden, bias = k.size("hidden_size"), k.flag(f.mlp_bias)
    part = mixture(k, f, f.moe, at)
    slim = tuple(
        Matrix(m.name, *((narrow, m.inp) if m.out == hidden else (m.out, narrow)), m.role, m.count, m.active)
        if m.role == "expert"
        else m
        for m in part.matrices
    )
    stem = f"{at.layer}.{f.moe.block}"
    around = linears(stem, "mlp", ("fc1_latent_proj", narrow, hidden), ("fc2_latent_proj", hidden, narrow), bias=bias)
    return Part(slim, part.vectors, expert_vectors=part.expert_vectors, wide=part.wide) + around


def mllama(k: Keys, f: Family, at: Place) -> Part:
    """Attention to an image. What is kept are keys and values of its tokens."""
    stem, hidden = f"{at.layer}.cross_attn", k.size("hidden_size")
    count, kv = heads(k, f)
    dim = head_dim(k)
    part = linears(stem, "attention", ("q_proj", count * dim, hidden), ("o_proj", hidden, count * dim))
    part += linears(stem, "attention", *((name, kv * dim, hidden) for name in ("k_proj", "v_proj")))
    cache = Cache("cross", 2 * kv * dim, 2 * kv * dim, kv_heads=kv, head_dim=dim)
    return part + Part((), 2 * dim + 2, (cache,), count, dim, dim)


def slopes(k: Keys, f: Family, at: Place) -> Part:
    """Apertus' activation learns two numbers."""
    return Part((), 2)


# Outside of the layers.


def positions(k: Keys, f: Family) -> Outside:
    """GPT-2: a table."""
    return (Matrix("transformer.wpe", k.size("max_position_embeddings"), k.size("hidden_size"), "embedding", 1, 0),), 0


def bloom(k: Keys, f: Family) -> Outside:
    return (), f.norm_values(k, k.size("hidden_size"))


def opt(k: Keys, f: Family) -> Outside:
    """A table of positions, two longer than said; projections where the embedding is narrower than the model."""
    hidden = k.size("hidden_size")
    narrow = k.size("word_embed_proj_dim", hidden)
    made = [Matrix("model.decoder.embed_positions", k.size("max_position_embeddings") + 2, hidden, "embedding", 1, 0)]
    if narrow != hidden:
        made.append(Matrix("model.decoder.project_in", hidden, narrow, "other"))
        made.append(Matrix("model.decoder.project_out", narrow, hidden, "other"))
    last = k.flag("do_layer_norm_before", True) and not k.flag("_remove_final_layer_norm")
    return tuple(made), f.norm_values(k, hidden) if last else 0
