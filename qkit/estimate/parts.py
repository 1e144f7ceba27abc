"""`Weights`: bytes by class, and what of them one decode step reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Classes in the order in which reports list them.
CLASSES = (
    "attention", "mlp", "expert", "shared", "router", "embedding", "head", "norm", "tower", "mtp", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Bytes of one class that are read alike.

    role       one of CLASSES
    values     codes of quantized matrices, or plain values; of GGUF whole blocks
    scales     scales, zero points and what else belongs to codes
    count      matrices that they are spread over evenly (experts); active: how many of them one token reads
    quantized  whether values are codes
    """

    role: str
    values: int
    scales: int = 0
    count: int = 1
    active: float = 1
    quantized: bool = False

    @property
    def nbytes(self) -> int:
        return self.values + self.scales

    def read(self, batch: int) -> float:
        """Bytes that one step of `batch` tokens reads, on the average: experts are chosen evenly and independently."""
        return self.nbytes * (1 - (1 - min(1.0, self.active / self.count)) ** batch)


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights of a model."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Weights:
        """Those that are alike added up."""
        sums: dict[tuple[str, int, float, bool], tuple[int, int]] = {}
        for p in parts:
            key = (p.role, p.count, p.active, p.quantized)
            values, scales = sums.get(key, (0, 0))
            sums[key] = values + p.values, scales + p.scales
        made = (Part(k[0], *v, k[1], k[2], k[3]) for k, v in sums.items() if sum(v))
        return cls(tuple(sorted(made, key=lambda p: CLASSES.index(p.role))))

    @property
    def total(self) -> int:
        return sum(p.nbytes for p in self.parts)

    @property
    def quantized(self) -> int:
        """Codes of quantized matrices."""
        return sum(p.values for p in self.parts if p.quantized)

    @property
    def scales(self) -> int:
        return sum(p.scales for p in self.parts)

    @property
    def by_class(self) -> dict[str, int]:
        """Class -> bytes, scales included; their sum is `total`."""
        found = {role: sum(p.nbytes for p in self.parts if p.role == role) for role in CLASSES}
        return {role: n for role, n in found.items() if n}

    def of_class(self, *roles: str) -> int:
        return sum(p.nbytes for p in self.parts if p.role in roles)

    def read(self, batch: int = 1) -> float:
        """Bytes that one decode step of `batch` sequences reads: an embedding that is only looked up, towers and MTP
        layers not; of experts those that it is expected to meet, where each token chooses evenly."""
        return sum(p.read(batch) for p in self.parts)
