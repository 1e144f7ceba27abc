"""`Kv`: bytes of a KV cache by kind of layer, and where they come from in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.architecture import Cache

_WORDS = {
    "full": "layers", "sliding": "sliding layers", "chunked": "chunked layers", "latent": "latent (MLA) layers",
    "cross": "cross-attention layers", "index": "indexers",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Layers of one kind that keep the same.

    values  that a token keeps, or a whole sequence where it is a state (tokens 1)
    size    bytes of a value; share: of one rank; heads, dim: of keys and of values, where they are what is kept
    """

    kind: str
    values: int
    tokens: int
    batch: int
    size: Fraction
    share: Fraction = Fraction(1)
    heads: int = 0
    dim: int = 0
    layers: int = 1

    @classmethod
    def kept(cls, cache: Cache, tokens: int, batch: int, size: Fraction, share: Fraction) -> Part:
        """Of the tokens of one layer."""
        alike = cache.per_token == 2 * cache.kv_heads * cache.head_dim
        heads = int(cache.kv_heads * share) if alike else 0
        return cls(cache.kind, cache.per_token, tokens, batch, size, share, heads, cache.head_dim if heads else 0)

    @classmethod
    def state(cls, values: int, batch: int, size: Fraction, share: Fraction) -> Part:
        """Of one layer, whatever its tokens."""
        return cls("state", values, 1, batch, size, share)

    @property
    def nbytes(self) -> int:
        return math.ceil(self.layers * self.batch * self.tokens * self.values * self.share * self.size)

    @property
    def words(self) -> str:
        """ "28 sliding layers x 1,023 tokens x 2 (K, V) x 16 KV heads x 128 dims x 2 bytes"."""
        if self.kind == "state":
            return f"{self.layers} states x {self.values:,} values x {_number(self.size)} bytes"
        kept = f"{_number(self.values * self.share)} values"
        if self.heads:
            kept = f"2 (K, V) x {self.heads} KV heads x {self.dim} dims"
        return f"{self.layers} {_WORDS[self.kind]} x {self.tokens:,} tokens x {kept} x {_number(self.size)} bytes"


@dataclass(frozen=True)
class Kv:
    """parts: by kind of layer; pages: what paging adds, rounding and padding together (vLLM)."""

    parts: tuple[Part, ...]
    total: int
    batch: int = 1
    note: str = ""

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Kv:
        """Those that are alike counted together."""
        found: dict[Part, int] = {}
        for part in parts:
            if part.values:
                found[part] = found.get(part, 0) + 1
        made = tuple(replace(part, layers=n) for part, n in found.items())
        return cls(made, sum(part.nbytes for part in made), made[0].batch if made else 1)

    @property
    def by_kind(self) -> dict[str, int]:
        """Kind of layer -> bytes. Of vLLM before what pages add."""
        kinds = dict.fromkeys(part.kind for part in self.parts)
        return {kind: sum(p.nbytes for p in self.parts if p.kind == kind) for kind in kinds}

    @property
    def formula(self) -> str:
        """In words, with its numbers; "nothing" where no layer keeps anything."""
        terms = " + ".join(part.words for part in self.parts) or "nothing"
        return f"batch {self.batch} x ({terms})" + (f", {self.note}" if self.note else "")


def _number(value: Fraction | int) -> str:
    return f"{int(value):,}" if value == int(value) else f"{float(value):,.4g}"
