"""A text decoder from its part of a config."""

from __future__ import annotations

from dataclasses import replace

from .families import FAMILIES
from .family import Family
from .keys import Keys
from .kinds import layer_kinds
from .mlp import dense, mixture
from .part import Part, Place, linears
from .types import FAMILY, USUAL, Architecture, Matrix
from .usual import usual

# Without these a config describes nothing, whatever its class would have in their place.
_ESSENTIAL = ("hidden_size", "vocab_size", "num_attention_heads")


def decoder(k: Keys, tied: Keys | None = None) -> Architecture:
    """A decoder alone, from its own part of the config. tied: the part that says whether it has a head of its own."""
    family = FAMILIES.get(k.model_type)
    f = family or usual(k)
    for name in _ESSENTIAL:
        if family and tied is None and not k.has(name) and k.get(name) is not None:
            k.missing(name)
    hidden, vocab = k.size("hidden_size"), k.size("vocab_size")
    layers, wide, kind = [], 0, ""
    for index, kind in enumerate(layer_kinds(k, f.rule)):
        part = block(k, f, Place(f"{f.layers}.{index}", index, kind))
        layers.append(part.layer())
        wide = max(wide, part.wide)
    narrow = k.size(f.embedding_width, hidden)
    embedding = Matrix(f.embedding, vocab + f.more_rows, narrow, "embedding", active=0)
    head = None if _is_tied(k, tied, f) else Matrix(f.head, vocab, narrow, "head")
    ahead = _ahead(k, f, len(layers), kind)
    others, small = f.outside(k, f) if f.outside else ((), 0)
    small += f.norm_values(k, hidden) if f.final_norm else 0
    return Architecture(
        k.model_type,
        FAMILY if family else USUAL,
        tuple(layers),
        hidden,
        wide,
        vocab,
        k.size("max_position_embeddings", 0, least=0) or None,
        embedding,
        head,
        others,
        mtp=ahead.matrices,
        mtp_vectors=ahead.vectors,
        vectors=small + (vocab if k.flag(f.head_bias) else 0),
    )


def _is_tied(k: Keys, outer: Keys | None, f: Family) -> bool:
    """The whole config's word counts before that of its part for the text."""
    if outer is not None and (outer.get("tie_word_embeddings") is not None or not k.has("tie_word_embeddings")):
        return outer.flag("tie_word_embeddings", f.tied)
    return k.flag("tie_word_embeddings", f.tied)


def _ahead(k: Keys, f: Family, layers: int, kind: str) -> Part:
    """DeepSeek's layers that predict the tokens after the next: a whole block each, what joins its two inputs, and
    copies of embedding and head. The class's own default is no word on what is in the files."""
    count = k.size("num_nextn_predict_layers", 0, least=0, most=16) if "num_nextn_predict_layers" in k.config else 0
    hidden, vocab = k.size("hidden_size"), k.size("vocab_size")
    part = Part()
    for index in range(layers, layers + count):
        stem = f"{f.layers}.{index}"
        part += block(k, f, Place(stem, layers - 1, kind)) + Part((), 3 * hidden)
        part += linears(stem, "mtp", ("eh_proj", hidden, 2 * hidden), ("embed_tokens", vocab, hidden))
        part += linears(stem, "mtp", ("shared_head.head", vocab, hidden))
    return replace(part, matrices=tuple(replace(m, role="mtp", active=0) for m in part.matrices))


def block(k: Keys, f: Family, at: Place) -> Part:
    """One layer: what mixes tokens, an MLP or experts, norms."""
    part = f.mixers.get(at.kind, f.mixer)(k, f, at)
    norm = f.norm_values(k, k.size("hidden_size"))
    if at.kind in f.single:
        return part + Part((), norm)
    part += Part((), f.norm_count(k) * norm)
    if f.extra is not None:
        part += f.extra(k, f, at)
    if f.moe is not None and f.moe.sparse(k, at.index):
        return part + mixture(k, f, f.moe, at)
    return part + dense(k, f, at)
