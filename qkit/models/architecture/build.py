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
from .part import Part
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
    basis = FAMILY if family else USUAL
    f = family or Family()
    hidden, vocab = k.size("hidden_size"), k.size("vocab_size")
    layers, wide = [], 0
    for index, kind in enumerate(layer_kinds(k, f.rule)):
        part = block(k, f, index, kind)
        layers.append(part.layer())
        wide = max(wide, part.wide)
    embedding = Matrix(f.embedding, vocab, hidden, "embedding", active=0)
    tied = k.flag("tie_word_embeddings", f.tied)
    head = None if tied else Matrix(f.head, vocab, hidden, "head")
    return Architecture(
        k.model_type,
        basis,
        tuple(layers),
        hidden,
        wide,
        vocab,
        k.size("max_position_embeddings", 0, least=0) or None,
        embedding,
        head,
        vectors=f.norm_values(k, hidden) + (vocab if k.flag(f.head_bias) else 0),
    )


def block(k: Keys, f: Family, index: int, kind: str) -> Part:
    stem = f"{f.layers}.{index}"
    mixer = f.mixers.get(kind, f.mixer)
    part = mixer(k, f, f"{stem}.{f.attention}", kind)
    part += Part((), f.norms * f.norm_values(k, k.size("hidden_size")))
    if f.moe is not None and f.moe.sparse(k, index):
        return part + mixture(k, f, f.moe, stem)
    return part + dense(k, f, f"{stem}.{f.mlp}")
