"""`architecture`: from a parsed config.json to what the model consists of. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import QkitError
from .families import FAMILIES
from .family import Family
from .keys import Keys
from .kinds import layer_kinds
from .mlp import dense, mixture
from .part import Part, Place
from .types import FAMILY, USUAL, Architecture, Matrix


def architecture(config: Mapping[str, Any]) -> Architecture:
    """What the model of a config.json consists of.

    Raises QkitError that names the field which is missing or impossible."""
    if not isinstance(config, Mapping):
        raise QkitError("config.json is not an object", "is this a transformers checkpoint?")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise QkitError("config.json names no model_type", "is this a transformers checkpoint?")
    return decoder(Keys(config, kind))


def decoder(k: Keys) -> Architecture:
    """A decoder alone, from its own part of the config."""
    family = FAMILIES.get(k.model_type)
    f = family or Family()
    hidden, vocab = k.size("hidden_size"), k.size("vocab_size")
    layers, wide = [], 0
    for index, kind in enumerate(layer_kinds(k, f.rule)):
        part = block(k, f, Place(f"{f.layers}.{index}", index, kind))
        layers.append(part.layer())
        wide = max(wide, part.wide)
    narrow = k.size(f.embedding_width, hidden)
    embedding = Matrix(f.embedding, vocab, narrow, "embedding", active=0)
    head = None if k.flag("tie_word_embeddings", f.tied) else Matrix(f.head, vocab, narrow, "head")
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
