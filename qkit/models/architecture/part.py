"""Parts that layers are put together from."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Cache, Layer, Matrix


@dataclass(frozen=True)
class Place:
    """Where in a model a layer is. layer: "model.layers.3"; kind: a word of `kinds`."""

    layer: str
    index: int
    kind: str


@dataclass(frozen=True)
class Part:
    """Some matrices and small parameters of a layer, and what they keep of a sequence. wide: see
    `Architecture.intermediate`."""

    matrices: tuple[Matrix, ...] = ()
    vectors: int = 0
    caches: tuple[Cache, ...] = ()
    heads: int = 0
    head_dim: int = 0
    v_dim: int = 0
    expert_vectors: int = 0
    wide: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(
            self.matrices + other.matrices,
            self.vectors + other.vectors,
            self.caches + other.caches,
            self.heads or other.heads,
            self.head_dim or other.head_dim,
            self.v_dim or other.v_dim,
            self.expert_vectors + other.expert_vectors,
            max(self.wide, other.wide),
        )

    def layer(self) -> Layer:
        return Layer(
            self.matrices, self.vectors, self.caches, self.heads, self.head_dim, self.v_dim, self.expert_vectors
        )


def linears(stem: str, role: str, *shapes: tuple[str, int, int], bias: bool = False) -> Part:
    """Matrices under one module; (name, outputs, inputs) each, with a bias of all its outputs or none."""
    made = tuple(Matrix(f"{stem}.{name}", out, inp, role) for name, out, inp in shapes)
    return Part(made, sum(out for _, out, _ in shapes) if bias else 0)
