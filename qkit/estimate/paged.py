"""vLLM's KV cache: pages of one size for all layers, in groups of layers that share a table.

Reference: vLLM 0.32, v1/kv_cache_interface.py (what a request may hold), v1/core/kv_cache_utils.py (groups, pages made
equal), platforms/interface.py (pages of states). In one group, or groups of equal pages:

    bytes = sum over groups of (pages of a request) x (layers of a group) x (bytes of a page)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from ..models.architecture import Architecture, Cache
from .kv import Kv, Part
from .setting import Setting, caches, seen, share, state_bytes

# Tokens by which pages of attention grow until a state fits in one: the least block of a kernel, and of one for MLA.
_STEP, _LATENT_STEP = 16, 128


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


def layout(arch: Architecture, size: Fraction, s: Setting) -> tuple[list[Spec], int]:
    """(every layer as vLLM sees it, tokens of a page), whatever the length of a request."""
    attention = [c for c in caches(arch) if c.kind != "state"]
    kept = [[_bytes(c, size, s) for c in layer.caches if c.kind == "state"] for layer in arch.layers]
    states = [sum(own, Fraction(0)) for own in kept if own]  # all states of a layer are one page
    block = _block(attention, states, size, s)
    page = max((_page(c, block, size, s) for c in attention), default=0)
    specs = [Spec("state", None, 0, max(page, math.ceil(held))) for held in states]
    for c in attention:
        kind = "cross" if c.kind == "cross" else c.kind if c.window is not None else "full"
        # A cross layer's tokens are those of the encoder: as many as the decoder's where nobody says.
        window = (c.window or s.encoder_tokens) if kind == "cross" else c.window
        specs.append(Spec(kind, window, block, _page(c, block, size, s)))
    return specs, block


def paged(arch: Architecture, tokens: int, batch: int, size: Fraction, s: Setting) -> Kv:
    """What `batch` requests of `tokens` tokens may hold of vLLM's pool, on one rank."""
    specs, block = layout(arch, size, s)
    total = batch * request(groups(specs), tokens, s.in_flight)
    attends = any(c.kind != "state" for c in caches(arch))
    note = f"in pages of {block} tokens: {total:,} bytes" if attends else ""
    return replace(Kv.of(_parts(arch, tokens, batch, size, s)), total=total, note=note)


def _block(attention: list[Cache], states: list[Fraction], size: Fraction, s: Setting) -> int:
    """Tokens of a page: as many as make room for a state, in steps of a kernel's block."""
    if not attention or not states:
        return s.block
    step = max(_STEP, s.block, _LATENT_STEP if any(c.kind == "latent" for c in attention) else 0)
    token = min(_bytes(c, size, s) for c in attention)
    return max(s.block, step * math.ceil(max(states) / (step * token)))


def _parts(arch: Architecture, tokens: int, batch: int, size: Fraction, s: Setting) -> Iterator[Part]:
    """Before anything is rounded to pages."""
    for c in caches(arch):
        if c.kind == "state":
            yield Part.state(c.fixed, batch, state_bytes(c, s), share(c, s.tp))
        elif c.kind == "cross":
            yield Part.kept(c, seen(c, tokens, s), batch, size, share(c, s.tp))
        else:
            yield Part.kept(c, min(tokens, c.window or tokens), batch, _size(c, size), share(c, s.tp))


def _page(cache: Cache, block: int, size: Fraction, s: Setting) -> int:
    return math.ceil(block * _bytes(cache, size, s))


def _bytes(cache: Cache, size: Fraction, s: Setting) -> Fraction:
    """Of one token, or of a state."""
    if cache.kind == "state":
        return cache.fixed * share(cache, s.tp) * state_bytes(cache, s)
    return cache.per_token * share(cache, s.tp) * _size(cache, size)


def _size(cache: Cache, size: Fraction) -> Fraction:
    """Bytes of a value of a token. Keys of an indexer are FP8 whatever the cache, with a float32 for 128 of them."""
    return (
        Fraction(cache.per_token + 4 * _pages(cache.per_token, 128), cache.per_token) if cache.kind == "index" else size
    )


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
