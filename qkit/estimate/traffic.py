"""What one step of a model moves and multiplies: the numbers that a roofline asks for."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.architecture import Architecture
from .parts import Weights


@dataclass(frozen=True)
class Traffic:
    """One model as an engine holds it. Bytes and values are of the whole model, over all devices.

    layers                        that run one after the other
    dense_bytes, dense_values     linears that every token passes, without the head
    expert_bytes, expert_values   of all experts; a token passes `chosen` of `experts`
    head_bytes, head_values       the output head
    hidden                        width of a token between layers
    cache                         (bytes that a token keeps, window or None) of layers that are alike
    state_bytes                   what a sequence keeps whatever its length
    attending                     (operations of one query with one key, window or None) of layers that are alike
    groups                        query heads that share a key and value head
    """

    layers: int
    dense_bytes: float
    dense_values: float
    expert_bytes: float
    expert_values: float
    experts: int
    chosen: float
    head_bytes: float
    head_values: float
    hidden: int
    cache: tuple[tuple[float, int | None], ...]
    state_bytes: float
    attending: tuple[tuple[float, int | None], ...]
    groups: float

    def weight_bytes(self, tokens: float) -> float:
        """Bytes of the layers' linears that a pass over `tokens` tokens reads: of experts those that are expected to
        be hit where each token chooses evenly."""
        return self.dense_bytes + self.expert_bytes * self.hit(tokens)

    def hit(self, tokens: float) -> float:
        """The share of experts that `tokens` tokens meet."""
        if not self.experts:
            return 0.0
        return 1.0 - (1.0 - min(1.0, self.chosen / self.experts)) ** max(1.0, tokens)

    @property
    def values(self) -> float:
        """Values of the layers' linears that one token is multiplied with."""
        return self.dense_values + (self.expert_values * self.chosen / self.experts if self.experts else 0.0)

    def cache_bytes(self, context: float) -> float:
        """What a step reads of the cache of one sequence with `context` tokens."""
        return self.state_bytes + sum(size * min(context, window or context) for size, window in self.cache)

    def attention(self, queries: float, context: float) -> float:
        """Operations of `queries` queries that each look at `context` keys."""
        return queries * sum(ops * min(context, window or context) for ops, window in self.attending)


def traffic(arch: Architecture, weights: Weights, *, cache_bytes: float = 2.0, latent: bool = True) -> Traffic:
    """The traffic of an architecture whose weights take these bytes.

    cache_bytes  of a value in the cache
    latent       whether the engine keeps MLA's latent, and not the keys and values made of it
    """
    matrices = [m for layer in arch.layers for m in layer.matrices]
    experts = next((p for p in weights.parts if p.role == "expert"), None)
    head = arch.head or arch.embedding
    heads = weights.of_class("head") or sum(p.nbytes for p in weights.parts if p.role == "embedding" and p.active)
    read = sum(p.nbytes for p in weights.parts if p.active and p.role not in ("expert", "head", "embedding"))
    attention: dict[int | None, float] = {}
    cache: dict[int | None, float] = {}
    states, queries, keys = 0.0, 0, 0
    for layer in arch.layers:
        for kept in layer.caches:
            states += kept.fixed * cache_bytes
            tokens = kept.per_token if latent else kept.expanded or kept.per_token
            if tokens:
                cache[kept.window] = cache.get(kept.window, 0.0) + tokens * cache_bytes
        attending = next((kept for kept in layer.caches if kept.kind != "state"), None)
        if attending and layer.attention_heads:
            ops = 2.0 * layer.attention_heads * (layer.head_dim + layer.v_dim)
            attention[attending.window] = attention.get(attending.window, 0.0) + ops
            queries += layer.attention_heads
            keys += attending.kv_heads or layer.attention_heads
    return Traffic(
        layers=len(arch.layers),
        dense_bytes=read,
        dense_values=sum(m.numel_active for m in matrices if m.role != "expert"),
        expert_bytes=weights.of_class("expert"),
        expert_values=sum(m.numel for m in matrices if m.role == "expert"),
        experts=experts.count if experts else 0,
        chosen=experts.active if experts else 0.0,
        head_bytes=heads,
        head_values=head.numel,
        hidden=arch.hidden,
        cache=tuple((size, window) for window, size in cache.items()),
        state_bytes=states,
        attending=tuple((ops, window) for window, ops in attention.items()),
        groups=queries / keys if keys else 1.0,
    )
