"""A text decoder from its part of a config."""

from __future__ import annotations

from .families import FAMILIES
from .family import Family
from .keys import Keys
from .kinds import layer_kinds
from .mlp import dense, mixture
from .part import Part, Place
from .types import FAMILY, USUAL, Architecture, Matrix
from .usual import usual

# Without these a config describes nothing, whatever its class would have in their place.
_ESSENTIAL = ("hidden_size", "vocab_size")


def decoder(k: Keys, tied: Keys | None = None) -> Architecture:
    """A decoder alone, from its own part of the config. tied: the part that says whether it has a head of its own."""
    family = FAMILIES.get(k.model_type)
    f = family or usual(k)
    for name in _ESSENTIAL:
        if family and tied is None and not k.has(name):
            k.missing(name)
    hidden, vocab = k.size("hidden_size"), k.size("vocab_size")
    layers, wide = [], 0
    for index, kind in enumerate(layer_kinds(k, f.rule)):
        part = block(k, f, Place(f"{f.layers}.{index}", index, kind))
        layers.append(part.layer())
        wide = max(wide, part.wide)
    narrow = k.size(f.embedding_width, hidden)
    embedding = Matrix(f.embedding, vocab + f.more_rows, narrow, "embedding", active=0)
    head = None if _is_tied(k, tied, f) else Matrix(f.head, vocab, narrow, "head")
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
        vectors=small + (vocab if k.flag(f.head_bias) else 0),
    )


def _is_tied(k: Keys, outer: Keys | None, f: Family) -> bool:
    """The whole config's word counts before that of its part for the text."""
    if outer is not None and (outer.get("tie_word_embeddings") is not None or not k.has("tie_word_embeddings")):
        return outer.flag("tie_word_embeddings", f.tied)
    return k.flag("tie_word_embeddings", f.tied)


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
