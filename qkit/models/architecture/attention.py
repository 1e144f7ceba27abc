"""Attention of every kind: its linears, biases and norms, and what it keeps of a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import QkitError
from .keys import Keys
from .part import Part, Place, linears
from .types import Cache

if TYPE_CHECKING:
    from .family import Family


def heads(k: Keys, f: Family) -> tuple[int, int]:
    """(heads of queries, heads of keys and values)."""
    queries = k.size("num_attention_heads", most=1 << 20)
    kv = f.kv_heads(k) if f.kv_heads else k.size("num_key_value_heads", queries, most=1 << 20)
    if queries % kv:
        raise QkitError(
            f"{queries} attention heads in config.json do not divide into {kv} key/value heads", "check config.json"
        )
    return queries, kv


def head_dim(k: Keys) -> int:
    """Given, or the width divided by the heads, the rest dropped as transformers does."""
    given = k.get("head_dim")
    if given is not None:
        return k.size("head_dim")
    return max(1, k.size("hidden_size") // k.size("num_attention_heads"))


def kept(k: Keys, kind: str, values: int, kv_heads: int, dim: int, expanded: int | None = None) -> Cache:
    """The cache of a layer of `kind` ("full_attention", "sliding_attention", "chunked_attention", or "latent") whose
    tokens keep so many values."""
    expanded = values if expanded is None else expanded
    window = None
    name = kind.removesuffix("_attention")
    if name == "sliding":
        window = k.size("sliding_window")
    elif name == "chunked":
        window = k.size("attention_chunk_size")
    elif name not in ("full", "latent"):
        raise QkitError(
            f"config.json has a layer of {kind}, and {k.model_type!r} none that are known here", "check its layer_types"
        )
    return Cache(name, values, expanded, window, kv_heads=kv_heads, head_dim=dim)


def grouped(k: Keys, f: Family, at: Place) -> Part:
    """Queries, keys and values in heads, of which groups share keys and values: most models."""
    stem = f"{at.layer}.{f.attention}"
    queries, kv = heads(k, f)
    dim = head_dim(k)
    v_dim = k.size("v_head_dim", dim) if f.own_values else dim
    hidden = k.size("hidden_size")
    asking = queries * dim * (2 if f.gated_queries else 1)
    outs = (asking, kv * dim, kv * v_dim)
    qkv_bias, out_bias = k.flag(f.qkv_bias), k.flag(f.qkv_bias if f.out_bias is None else f.out_bias)
    if len(f.qkv) == 1:
        part = linears(stem, "attention", (f.qkv[0], sum(outs), hidden), bias=qkv_bias)
    else:
        named = tuple((name, out, hidden) for name, out in zip(f.qkv, outs, strict=True))
        part = linears(stem, "attention", *named, bias=qkv_bias)
    part += linears(stem, "attention", (f.out, hidden, queries * v_dim), bias=out_bias)
    small = queries if f.sinks else 0
    if f.qk_norm and k.flag(f.qk_norm_if):
        small += {"head": 2 * dim, "heads": (queries + kv) * dim}[f.qk_norm] * (2 if f.qk_norm_bias else 1)
    cache = kept(k, at.kind, kv * (dim + v_dim), kv, dim)
    return part + Part((), small, (cache,), queries, dim, v_dim)


def latent(k: Keys, f: Family, at: Place) -> Part:
    """Multi-head latent attention: keys and values of all heads are made of one latent, which is what is kept."""
    stem = f"{at.layer}.{f.attention}"
    queries = k.size("num_attention_heads", most=1 << 20)
    hidden, rank = k.size("hidden_size"), k.size("kv_lora_rank")
    rope, nope, v_dim = (
        k.size("qk_rope_head_dim"),
        k.size("qk_nope_head_dim"),
        k.size("v_head_dim", max(1, hidden // queries)),
    )
    low = k.size("q_lora_rank", 0, least=0)
    bias = k.flag(f.qkv_bias)
    part = Part()
    if low:
        part += linears(stem, "attention", ("q_a_proj", low, hidden), bias=bias) + Part((), low)
        part += linears(stem, "attention", ("q_b_proj", queries * (nope + rope), low))
    else:
        part += linears(stem, "attention", ("q_proj", queries * (nope + rope), hidden))
    part += linears(stem, "attention", ("kv_a_proj_with_mqa", rank + rope, hidden), bias=bias) + Part((), rank)
    part += linears(stem, "attention", ("kv_b_proj", queries * (nope + v_dim), rank))
    part += linears(stem, "attention", (f.out, hidden, queries * v_dim), bias=bias)
    cache = kept(k, "latent", rank + rope, 0, rank + rope, queries * (nope + rope + v_dim))
    return part + Part((), 0, (cache,), queries, nope + rope, v_dim)


def indexed(k: Keys, f: Family, at: Place) -> Part:
    """The same with an indexer that chooses tokens (DeepSeek-V3.2), for later layers too (GLM-5)."""
    part = latent(k, f, at)
    if not _chooses(k, at.index):
        return part
    stem, hidden = f"{at.layer}.{f.attention}.indexer", k.size("hidden_size")
    count, dim = k.size("index_n_heads", most=1 << 20), k.size("index_head_dim")
    part += linears(stem, "attention", ("wq_b", count * dim, k.size("q_lora_rank")), ("wk", dim, hidden))
    part += linears(stem, "attention", ("weights_proj", count, hidden))
    return part + Part((), 2 * dim, (Cache("index", dim, dim, head_dim=dim),))


def _chooses(k: Keys, index: int) -> bool:
    """Whether a layer has an indexer; transformers: GlmMoeDsaConfig.indexer_types."""
    pattern = k.get("index_topk_pattern")
    listed = list(pattern) if isinstance(pattern, str) else k.listed("indexer_types") or k.listed("index_topk_pattern")
    if listed:
        return index < len(listed) and listed[index] in ("full", "F")
    every, offset = k.size("index_topk_freq", 1), k.size("index_skip_topk_offset", 2, least=0)
    return max(index - offset + 1, 0) % every == 0
