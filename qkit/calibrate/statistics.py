"""What is kept of a layer's inputs: one class for each kind a method can need, and their table."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..methods.square import mirror

if TYPE_CHECKING:
    import torch


class Statistic(Protocol):
    """Accumulates over batches of inputs. tokens: how many were seen."""

    tokens: int

    def add(self, x: torch.Tensor) -> None:
        """x [..., in], any float type, on the statistic's device."""
        ...

    def result(self) -> Any:
        """What `Method.quantize` gets. To be called once, after the last `add`."""
        ...


class Hessian:
    """X^T X, float32 [in, in], on `device`; zero where no token came. Or rows of it, first .. last, from their diagonal
    on: float32 [last - first, in - first].

    Tokens are added in slabs of a fixed number, whatever the batches are in which they come: these decide no bit."""

    def __init__(self, in_features: int, device: torch.device | str, first: int = 0, last: int | None = None):
        import torch

        last = in_features if last is None else last
        self.first = first
        self.value = torch.zeros(last - first, in_features - first, dtype=torch.float32, device=device)
        self.tokens = 0
        self._slab = slab_tokens(in_features)
        self._waiting: torch.Tensor | None = None  # the beginning of a slab, [slab, in]
        self._waits = 0

    def copy(self) -> Hessian:
        """One that can be added to in the place of this one."""
        made = copy(self)
        made.value = self.value.clone()
        if self._waiting is not None:
            made._waiting = self._waiting.new_empty(self._slab, self._waiting.shape[1])
            made._waiting[: self._waits] = self._waiting[: self._waits]
        return made

    def trim(self) -> None:
        """Hold no more than has to travel; nothing is added until it is copied."""
        self._waiting = self._waiting[: self._waits] if self._waiting is not None and self._waits else None

    def add(self, x: torch.Tensor) -> None:
        import torch

        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        while len(x):
            if not self._waits and len(x) >= self._slab:
                accumulate(self.value, x[: self._slab], self.first)
                x = x[self._slab :]
                continue
            if self._waiting is None:
                self._waiting = torch.empty(self._slab, x.shape[1], dtype=x.dtype, device=x.device)
            part, x = x[: self._slab - self._waits], x[self._slab - self._waits :]
            self._waiting[self._waits : self._waits + len(part)] = part
            self._waits += len(part)
            if self._waits == self._slab:
                accumulate(self.value, self._waiting, self.first)
                self._waits = 0

    def rows(self) -> torch.Tensor:
        """All tokens in; to be called last."""
        if self._waits:
            assert self._waiting is not None
            accumulate(self.value, self._waiting[: self._waits], self.first)
        self._waiting, self._waits = None, 0
        return self.value

    def result(self) -> torch.Tensor:
        return mirror(self.rows())


class Inputs:
    """The inputs themselves, [tokens, in]."""

    def __init__(self, in_features: int, device: torch.device | str):
        self.tokens = 0
        self._seen: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        self._seen.append(x.reshape(-1, x.shape[-1]))
        self.tokens += len(self._seen[-1])

    def result(self) -> torch.Tensor:
        import torch

        return torch.cat(self._seen)


@dataclass(frozen=True)
class Moments:
    """Per input channel, float32 [in]: the mean magnitude, and the mean square. Zero where no token came.
    tokens: how many did."""

    magnitude: torch.Tensor
    square: torch.Tensor
    tokens: int = 0


class InputMoments:
    """`Moments`, summed in float32."""

    def __init__(self, in_features: int, device: torch.device | str):
        import torch

        self.magnitude = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.square = torch.zeros_like(self.magnitude)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        for rows in x.reshape(-1, x.shape[-1]).split(4096):
            part = rows.float()
            self.magnitude += part.abs().sum(0)
            self.square += part.square().sum(0)
        self.tokens += x.shape[:-1].numel()

    def result(self) -> Moments:
        count = max(1, self.tokens)
        return Moments(self.magnitude / count, self.square / count, self.tokens)


def slab_tokens(in_features: int) -> int:
    """Tokens that are added to a Hessian at a time: few, so that their copy in float32 stays in a cache; many, where
    the square is so large that going over it is what costs."""
    return max(512, (16 << 20) // (4 * in_features))


def row_panels(in_features: int) -> list[tuple[int, int]]:
    """(first, end) of rows of a Hessian that are one product of matrices."""
    step = max(128, in_features // 16)
    return [(a, min(a + step, in_features)) for a in range(0, in_features, step)]


def accumulate(hessian: torch.Tensor, x: torch.Tensor, first: int = 0) -> None:
    """hessian (float32, whole [in, in], or whole panels of its rows as `Hessian` has them) += x^T x, in place. x
    [tokens, in], any float type.

    float32: the sum of n products carries a relative error of about sqrt(n) * 6e-8, 1e-5 at 32,768 tokens;
    damping at 1e-2 of the mean diagonal is three orders above it. Only blocks on and above the diagonal are
    computed, the rest is mirrored at the end: almost half the work of a full product.
    """
    part = x.to(hessian.dtype)
    for a, b in row_panels(x.shape[1]):
        if first <= a < first + len(hessian):
            hessian[a - first : b - first, a - first :].addmm_(part[:, a:b].T, part[:, a:])


STATISTICS: dict[str, Callable[[int, torch.device | str], Statistic]] = {"hessian": Hessian, "moments": InputMoments}


def statistic_bytes(kind: str, in_features: int) -> int:
    """What a statistic of that kind, a key of `STATISTICS`, takes while it is accumulated."""
    if kind != "hessian":
        return 8 * in_features
    return 4 * in_features**2 + 2 * slab_tokens(in_features) * in_features
