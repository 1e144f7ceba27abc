"""What is kept of a layer's inputs: one class for each kind a method can need, and their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
    """X^T X, float32 [in, in], on `device`; zero where no token came."""

    def __init__(self, in_features: int, device: torch.device | str):
        import torch

        self.value = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        accumulate(self.value, x)
        self.tokens += x.shape[:-1].numel()

    def result(self) -> torch.Tensor:
        return symmetrize(self.value)


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


def accumulate(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """hessian [in, in] (float32) += x^T x, in place. x [..., in], any float type.

    float32: the sum of n products carries a relative error of about sqrt(n) * 6e-8, 1e-5 at 32,768 tokens;
    damping at 1e-2 of the mean diagonal is three orders above it. Only blocks on and above the diagonal are
    computed, the rest is mirrored by `symmetrize`: almost half the work of a full product.
    """
    x = x.reshape(-1, x.shape[-1])
    n = hessian.shape[0]
    step = max(128, n // 16)
    # Slabs of tokens bound the float32 copy, and keep it in cache.
    for rows in x.split(max(256, (16 << 20) // (4 * n))):
        part = rows.to(hessian.dtype)
        for a in range(0, n, step):
            hessian[a : a + step, a:].addmm_(part[:, a : a + step].T, part[:, a:])


def symmetrize(hessian: torch.Tensor) -> torch.Tensor:
    """Mirror the upper triangle onto the lower, in place; returns its argument."""
    import torch

    upper = torch.triu(hessian, 1)
    hessian.triu_().add_(upper.T)
    # The diagonal blocks were computed whole; only their upper half is used, so this is exact.
    return hessian


STATISTICS: dict[str, Callable[[int, torch.device | str], Statistic]] = {"hessian": Hessian, "moments": InputMoments}
