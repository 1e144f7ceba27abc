"""vLLM's KV cache: pages of one size for all layers, in groups of layers that share a table.

Reference: vLLM 0.32, v1/kv_cache_interface.py (what a request may hold), v1/core/kv_cache_utils.py (groups, pages made
equal), platforms/interface.py (pages of states). In one group, or groups of equal pages:

    bytes = sum over groups of (pages of a request) x (layers of a group) x (bytes of a page)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from ..models.architecture import Architecture, Cache
from .kv import Kv, Part
from .setting import Setting, caches, share, value_bytes

_ALIGNED = 16  # tokens: pages of attention grow by these until a state fits in one


@dataclass(frozen=True)
class Spec:
    """One layer as vLLM sees it. page: bytes of `block` tokens, of a state of all of it."""

    kind: str
    window: int | None
    block: int
    page: int

    def pages(self, tokens: int, in_flight: int) -> int:
        """Of one request. A window may begin amid a page, and tokens of a step are held until it is done."""
        if self.kind == "state":
            return 1
        if self.kind == "sliding" and self.window is not None:
            return _pages(min(self.window - 1 + in_flight, tokens), self.block) + 1
        if self.kind == "chunked" and self.window is not None:
            return _pages(min(self.window + in_flight, tokens), self.block)
        return _pages(tokens, self.block)


def _pages(tokens: int, block: int) -> int:
    return -(-tokens // block)


def layout(arch: Architecture, size: Fraction, state_size: Fraction, s: Setting) -> tuple[list[Spec], int]:
    """(every layer as vLLM sees it, tokens of a page), whatever the length of a request."""
    specs: list[Spec] = []
    block = s.block
    for layer in arch.layers:
        states = [c for c in layer.caches if c.kind == "state"]
        if states:  # all states of a layer are one page
            held = sum(
                c.fixed * share(c, s.tp) * (value_bytes(c.fixed_dtype) if c.fixed_dtype else state_size) for c in states
            )
            specs.append(Spec("state", None, 0, math.ceil(held)))
    attention = [c for c in caches(arch) if c.kind != "state"]
    if specs and attention:
        token = min(_bytes(c, size, s.tp) for c in attention)
        needed = _pages(max(spec.page for spec in specs), math.ceil(token))
        block = max(block, -(-needed // _ALIGNED) * _ALIGNED)
        page = max(math.ceil(_bytes(c, size, s.tp) * block) for c in attention)
        specs = [replace(spec, page=max(page, spec.page)) for spec in specs]
    for c in attention:
        # A cross layer's tokens are those of the encoder: as many as the decoder's where nobody says.
        window = (c.window or s.encoder_tokens) if c.kind == "cross" else c.window
        kind = "cross" if c.kind == "cross" else c.kind if c.window is not None else "full"
        specs.append(Spec(kind, window, block, math.ceil(_bytes(c, size, s.tp) * block)))
    return specs, block


def paged(arch: Architecture, tokens: int, batch: int, size: Fraction, state_size: Fraction, s: Setting) -> Kv:
    """What `batch` requests of `tokens` tokens may hold of vLLM's pool, on one rank."""
    specs, block = layout(arch, size, state_size, s)
    parts: list[Part] = []
    for c in caches(arch):
        if c.kind == "state":
            own_size = value_bytes(c.fixed_dtype) if c.fixed_dtype else state_size
            parts.append(Part.of("state", c.fixed, 1, batch, own_size, share(c, s.tp)))
        else:
            kept = tokens if c.window is None or c.kind == "cross" else min(tokens, c.window)
            kept = _cross_tokens(c, tokens, s) if c.kind == "cross" else kept
            parts.append(Part.of(c.kind, c.per_token, kept, batch, size, share(c, s.tp)))
    total = batch * request(groups(specs), tokens, s.in_flight)
    counted = Kv.of(parts)
    return replace(counted, total=total, note=f"in pages of {block} tokens: {total:,} bytes")


def _bytes(cache: Cache, size: Fraction, tp: int) -> Fraction:
    return cache.per_token * share(cache, tp) * size


def _cross_tokens(cache: Cache, tokens: int, s: Setting) -> int:
    return cache.window or s.encoder_tokens or tokens


def groups(specs: list[Spec]) -> tuple[tuple[int, Spec], ...]:
    """(bytes for each page that a request holds in it, layers that are alike): all that a request's bytes depend on."""
    if not specs:
        return ()
    alike: dict[Spec, int] = {}
    if len({(spec.kind, spec.window) for spec in specs}) == 1:  # one table for all layers, whatever their pages
        for spec in specs:
            alike[spec] = alike.get(spec, 0) + 1
        return tuple((count * spec.page, spec) for spec, count in alike.items())
    largest = max(spec.page for spec in specs)
    for spec in specs:
        equal = _unified(spec, largest)
        alike[equal] = alike.get(equal, 0) + 1
    fewest, most = min(alike.values()), max(alike.values())
    size = most if most < fewest * 1.5 else fewest
    return tuple((_pages(count, size) * size * largest, spec) for spec, count in alike.items())


def request(grouped: tuple[tuple[int, Spec], ...], tokens: int, in_flight: int) -> int:
    """Bytes that one request holds of the pool."""
    return sum(nbytes * _held(spec, tokens, in_flight) for nbytes, spec in grouped)


def _held(spec: Spec, tokens: int, in_flight: int) -> int:
    if spec.kind == "cross":
        return _pages(spec.window or tokens, spec.block)
    return spec.pages(tokens, in_flight)


def _unified(spec: Spec, page: int) -> Spec:
    """With a page of this size: of more tokens where that comes out even, else padded."""
    if spec.kind != "state" and page % spec.page == 0:
        return replace(spec, block=spec.block * (page // spec.page), page=page)
    return replace(spec, page=page)
