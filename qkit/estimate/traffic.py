"""What one step of a model moves and multiplies: the numbers that a roofline asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..models.architecture import Architecture, Matrix

_STATES = ("state",)


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
    attention                     operations of one query with one key, over all layers
    attention_windows             the same as (operations, window or None) of layers that are alike
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
    attention_windows: tuple[tuple[float, int | None], ...]
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
        return queries * sum(ops * min(context, window or context) for ops, window in self.attention_windows)


def traffic(
    arch: Architecture, nbytes: Callable[[Matrix], float], *, cache_bytes: float = 2.0, latent: bool = True
) -> Traffic:
    """The traffic of an architecture.

    nbytes       bytes of a matrix, or of all in one place, as the engine reads it; of the head too
    cache_bytes  of a value in the cache
    latent       whether the engine keeps MLA's latent, and not the keys and values made of it
    """
    dense = [m for layer in arch.layers for m in layer.matrices if m.role != "expert"]
    experts = [m for layer in arch.layers for m in layer.matrices if m.role == "expert"]
    head = arch.head or arch.embedding
    attention: dict[int | None, float] = {}
    cache: dict[int | None, float] = {}
    states = 0.0
    heads = kv_heads = 0
    for layer in arch.layers:
        for kept in layer.caches:
            states += kept.fixed * cache_bytes
            tokens = kept.per_token if latent else kept.expanded
            if tokens:
                cache[kept.window] = cache.get(kept.window, 0.0) + tokens * cache_bytes
        attending = [kept for kept in layer.caches if kept.kind not in _STATES]
        if attending and layer.attention_heads:
            window = attending[0].window
            ops = 2.0 * layer.attention_heads * (layer.head_dim + layer.v_dim)
            attention[window] = attention.get(window, 0.0) + ops
            heads += layer.attention_heads
            kv_heads += attending[0].kv_heads or layer.attention_heads
    first = experts[0] if experts else None
    return Traffic(
        layers=len(arch.layers),
        dense_bytes=sum(map(nbytes, dense)),
        dense_values=sum(m.numel_active for m in dense),
        expert_bytes=sum(map(nbytes, experts)),
        expert_values=sum(m.numel for m in experts),
        experts=first.count if first else 0,
        chosen=first.active if first else 0.0,
        head_bytes=nbytes(head),
        head_values=head.numel,
        hidden=arch.hidden,
        cache=tuple((size, window) for window, size in cache.items()),
        state_bytes=states,
        attention_windows=tuple((ops, window) for window, ops in attention.items()),
        groups=heads / kv_heads if kv_heads else 1.0,
    )
