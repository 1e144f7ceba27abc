"""Bytes of one sequence's KV cache on one rank, quickly, for many lengths: what `cache.kv` says of a batch of one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from ..models.architecture import Architecture, Cache, Layer
from .cache import parts
from .paged import Spec, groups, layout, request
from .setting import Setting, caches, value_bytes


@dataclass
class Sequence:
    """Layers that keep the same are counted once, and lengths that were asked for are remembered."""

    arch: Architecture
    dtype: str
    engine: str
    setting: Setting
    _known: dict[int, int] = field(default_factory=dict)
    _pool: tuple[tuple[int, Spec], ...] = ()
    _alike: Architecture | None = None
    _counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.engine == "vllm":
            specs, _ = layout(self.arch, value_bytes(self.dtype), self.setting)
            self._pool = groups(specs)
            return
        counted: Counter[Cache] = Counter(caches(self.arch))
        self._alike = replace(self.arch, layers=tuple(Layer((), 0, (c,)) for c in counted))
        self._counts = tuple(counted.values())

    def nbytes(self, tokens: int) -> int:
        found = self._known.get(tokens)
        if found is None:
            found = self._known[tokens] = self._computed(tokens)
        return found

    def _computed(self, tokens: int) -> int:
        if self.engine == "vllm":
            return request(self._pool, tokens, self.setting.in_flight)
        assert self._alike is not None
        kept = parts(self._alike, tokens, 1, value_bytes(self.dtype), self.engine, self.setting)
        return sum(replace(part, layers=count).nbytes for part, count in zip(kept, self._counts, strict=True))
