"""What a model consists of, in numbers: matrices, small parameters and what each layer keeps of a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAMILY = "known family"
USUAL = "usual keys of a config: the family is not known"


@dataclass(frozen=True)
class Matrix:
    """One linear of a model, or all experts' in one place.

    name    as checkpoints with one matrix per expert call it, without ".weight": "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.experts.*.up_proj"
    out     outputs; inp: inputs, of one
    role    "attention" (and what takes its place: mamba, linear attention, convolutions), "mlp", "expert", "shared",
            "router", "embedding" (only looked up), "head", "tower" (vision, audio, their projectors, encoders), "mtp"
            (layers that predict further tokens), "other" (wherever it is, never quantized)
    count   how many there are; active: how many of them one token is multiplied with (0: a table)
    """

    name: str
    out: int
    inp: int
    role: str
    count: int = 1
    active: float = 1

    @property
    def numel(self) -> int:
        return self.out * self.inp * self.count

    @property
    def numel_active(self) -> float:
        return self.out * self.inp * self.active


@dataclass(frozen=True)
class Cache:
    """What one layer keeps of a sequence, in values (not bytes).

    kind         "full", "sliding", "chunked", "latent" (MLA), "state" (linear attention, mamba, convolutions, RWKV),
                 "cross" (keys and values of an encoder's output), "index" (keys by which a latent layer chooses)
    per_token    values that a token keeps; of MLA the latent and the rotated key
    expanded     the same for an engine that keeps MLA's keys and values, as transformers did before 5.20
    window       tokens that sliding and chunked layers see, the newest included; of cross-attention those of the
                 encoder's output where that has one length
    fixed        values that a sequence keeps whatever its length, as engines hold them
    fixed_dtype  the type of a state that is not held in the model's ("F32")
    wide         the same in transformers' cache, whose convolutions keep one column more; wide_dtype: its type
    kv_heads     what tensor parallelism divides, and replicates where there are too few; 0: a latent or a state
    head_dim     of keys
    """

    kind: str
    per_token: int = 0
    expanded: int = 0
    window: int | None = None
    fixed: int = 0
    fixed_dtype: str | None = None
    wide: int = 0
    wide_dtype: str | None = None
    kv_heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class Layer:
    """One block of a decoder.

    vectors         values of norms, biases and other small parameters, those of experts included
    expert_vectors  of them, those that belong to experts (gpt-oss' biases)
    caches          none where a layer keeps nothing (a bare MLP, keys shared with an earlier layer); several where
                    attention stands beside a state or cross-attention, or a state has parts of different types
    attention_heads, head_dim (of queries and keys), v_dim (of values); 0 where nothing attends
    """

    matrices: tuple[Matrix, ...]
    vectors: int
    caches: tuple[Cache, ...]
    attention_heads: int = 0
    head_dim: int = 0
    v_dim: int = 0
    expert_vectors: int = 0


@dataclass(frozen=True)
class Architecture:
    """A model, from its config.json alone.

    model_type      of the text decoder; basis: `FAMILY` or `USUAL`, to be shown
    head            None: tied, the embedding is the head too
    intermediate    the widest MLP that a token passes in one layer: of experts, those that it meets together
    max_tokens      what the config says the model takes; None: nothing
    others          position tables, projections between the blocks
    towers          vision and audio towers, projectors; encoders
    mtp             layers that predict further tokens, which files hold and most engines leave out
    vectors         small parameters outside of the layers
    """

    model_type: str
    basis: str
    layers: tuple[Layer, ...]
    hidden: int
    intermediate: int
    vocab: int
    max_tokens: int | None
    embedding: Matrix
    head: Matrix | None
    others: tuple[Matrix, ...] = ()
    towers: tuple[Matrix, ...] = ()
    towers_vectors: int = 0
    mtp: tuple[Matrix, ...] = ()
    mtp_vectors: int = 0
    vectors: int = 0

    @property
    def tied(self) -> bool:
        return self.head is None

    @property
    def matrices(self) -> Iterable[Matrix]:
        """All, as a file has them: embedding, layers, head, towers, MTP."""
        yield self.embedding
        yield from self.others
        for layer in self.layers:
            yield from layer.matrices
        if self.head is not None:
            yield self.head
        yield from self.towers
        yield from self.mtp

    @property
    def parameters(self) -> int:
        """All that the model has, towers included and MTP layers left out, as its name counts them."""
        small = self.vectors + self.towers_vectors + sum(layer.vectors for layer in self.layers)
        return small + sum(m.numel for m in self.matrices if m.role != "mtp")

    @property
    def mtp_parameters(self) -> int:
        return self.mtp_vectors + sum(m.numel for m in self.mtp)

    @property
    def active_parameters(self) -> int:
        """What one token of text is multiplied with: the head counts (a tied one too), tables, towers and MTP do not,
        and of experts those that are chosen."""
        total: float = self.vectors
        for layer in self.layers:
            total += layer.vectors - layer.expert_vectors + sum(m.numel_active for m in layer.matrices)
            one = next((m for m in layer.matrices if m.role == "expert"), None)
            total += layer.expert_vectors * one.active / one.count if one else 0
        total += sum(m.numel_active for m in self.others)
        total += (self.head or self.embedding).numel
        return round(total)
