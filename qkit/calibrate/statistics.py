"""What is kept of a layer's inputs: one class for each kind a method can need, and their table."""

from __future__ import annotations

from collections.abc import Callable
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
    """X^T X, float32 [in, in], on `device`; zero where no token came.

    Tokens are added in slabs of a fixed number, whatever the batches are in which they come: these decide no bit."""

    def __init__(self, in_features: int, device: torch.device | str):
        import torch

        self.value = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self._slab = slab_tokens(in_features)
        self._waiting: torch.Tensor | None = None  # the beginning of a slab, [slab, in]
        self._waits = 0

    def add(self, x: torch.Tensor) -> None:
        import torch

        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        while len(x):
            if not self._waits and len(x) >= self._slab:
                accumulate(self.value, x[: self._slab])
                x = x[self._slab :]
                continue
            if self._waiting is None:
                self._waiting = torch.empty(self._slab, x.shape[1], dtype=x.dtype, device=x.device)
            part, x = x[: self._slab - self._waits], x[self._slab - self._waits :]
            self._waiting[self._waits : self._waits + len(part)] = part
            self._waits += len(part)
            if self._waits == self._slab:
                accumulate(self.value, self._waiting)
                self._waits = 0

    def result(self) -> torch.Tensor:
        if self._waits:
            assert self._waiting is not None
            accumulate(self.value, self._waiting[: self._waits])
        self._waiting, self._waits = None, 0
        return mirror(self.value)


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


def accumulate(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """hessian [in, in] (float32) += x^T x, in place. x [tokens, in], any float type.

    float32: the sum of n products carries a relative error of about sqrt(n) * 6e-8, 1e-5 at 32,768 tokens;
    damping at 1e-2 of the mean diagonal is three orders above it. Only blocks on and above the diagonal are
    computed, the rest is mirrored at the end: almost half the work of a full product.
    """
    n = hessian.shape[0]
    step = max(128, n // 16)
    part = x.to(hessian.dtype)
    for a in range(0, n, step):
        hessian[a : a + step, a:].addmm_(part[:, a : a + step].T, part[:, a:])


STATISTICS: dict[str, Callable[[int, torch.device | str], Statistic]] = {"hessian": Hessian, "moments": InputMoments}


def statistic_bytes(kind: str, in_features: int) -> int:
    """What a statistic of that kind, a key of `STATISTICS`, takes while it is accumulated."""
    if kind != "hessian":
        return 8 * in_features
    return 4 * in_features**2 + 2 * slab_tokens(in_features) * in_features
