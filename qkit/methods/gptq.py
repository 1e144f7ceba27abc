"""GPTQ (arXiv:2210.17323) in its error-feedback form: round column by column, push each error onto later columns.

With H = X^T X over the calibration inputs of a layer, the squared output error of rounding W to Q is
tr((W - Q) H (W - Q)^T). Factor H = L L^T, L lower triangular: the error is the sum over columns j of
L_jj^2 |t_j - q_j|^2 with t_j = w_j + sum_{i>j} (w_i - q_i) L_ij / L_jj. So round t_j, from the last column to the
first. This is the paper's algorithm (section 3; the equivalence: QuIP, arXiv:2307.13304, theorem 6) with one Cholesky,
no inverse, and one square buffer (`square`): what the solve holds beside it is in slabs of rows.

Beyond the paper:
- Static groups with activation order: scales are fixed before the loop, columns are visited by falling
  diag(H), codes are stored in their own order, so g_idx stays trivial.
- Scales are searched, sign included, to minimize sum_j L_jj^2 (w_j - q_j)^2. L_jj^2 is what an error in column j costs
  *after* later columns have compensated it; diag(H), the usual weight, ignores the compensation.
- Coordinate descent over the codes afterwards: the loop never returns to a column, this does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..kernels.weight import Weight, stack_rows
from ..spec import LayerSpec
from . import square
from .base import Cost, Divided, Quantized, Shape
from .columns import Factored, factor, search_grid, solve_rows

if TYPE_CHECKING:
    import torch

_SLAB = 8 << 20  # weights solved at a time: bounds what is held beside the square
_LEAST_ROWS = 256
UNREACHED = "no calibration token reached it"


class Gptq(Divided):
    """Needs the Hessian of a layer's inputs. Options of `quantize_all`: damp, act_order, sweeps."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[str | None] = "hessian"

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        return quantize_all(weights, statistic, specs, **options)

    def begin(self, statistic: Any, **options: Any) -> Square:
        return begin(statistic, **options)

    def slabs(self, shapes: Sequence[Shape], specs: Sequence[LayerSpec]) -> list[list[tuple[int, int, int]]]:
        return list(_slabs(shapes, specs))

    def solve(self, rows: Sequence[torch.Tensor], begun: Square, spec: LayerSpec, **options: Any) -> list[Part]:
        return solve(rows, begun, spec, **options)

    def join(self, parts: Sequence[Part]) -> Quantized:
        return _joined(parts)

    def cost(self, shapes: Sequence[Shape], tokens: float) -> Cost:
        in_ = shapes[0][1]
        out = sum(shape[0] for shape in shapes)
        # The factor is used for rounding and for the error, and with the Hessian once for each code's descent.
        flops = 1.1 * tokens * in_**2 + in_**3 / 3 + 4.0 * out * in_**2
        # The square, and what is moved of it at a time; or of a slab of rows the weight, its float32, codes, errors and
        # their products, blocks of the square, codes as they are stored.
        rows = min(out, max(_LEAST_ROWS, _SLAB // in_))
        moved = 4 * min(square.SLAB, in_**2)
        return Cost(flops, 4 * in_**2 + max(moved, 22 * rows * in_ + 1024 * in_ + out * in_))


def quantize(
    w: torch.Tensor,
    hessian: torch.Tensor,
    scheme: LayerSpec,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    sweeps: int = 1,
) -> Quantized:
    """`quantize_all` for one weight, which leaves the Hessian as it is."""
    return quantize_all([w], hessian.clone(), [scheme], damp=damp, act_order=act_order, sweeps=sweeps)[0]


def quantize_all(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    schemes: Sequence[LayerSpec],
    *,
    damp: float = 0.01,
    act_order: bool = True,
    sweeps: int = 1,
) -> list[Quantized]:
    """Quantize weights that share an input, such as q, k and v; the Hessian is factored once.

    weights  float [out_i, in], on the device to compute on
    hessian  float32 [in, in], symmetric: X^T X over the calibration tokens (any positive multiple of it). Its memory is
             used for the factor: afterwards it holds something else
    damp     added to the diagonal, as a fraction of its mean; grown tenfold until the factorization succeeds,
             up to 1. Where it never does, or the Hessian is zero, the weights are rounded (searched scales) and
             `fallback` says why
    act_order  visit columns by falling diag(hessian)
    sweeps   coordinate-descent passes over the codes after the loop
    Raises QkitError for NaN or infinity in a weight or in the Hessian, ValueError for shapes that do not match.
    """
    n = hessian.shape[0]
    for w, scheme in zip(weights, schemes, strict=True):
        if w.ndim != 2 or w.shape[1] != n or hessian.shape != (n, n):
            raise ValueError(f"weight {list(w.shape)} and hessian {list(hessian.shape)} do not match")
        scheme.groups(n)
    begun = begin(hessian, damp=damp, act_order=act_order)
    parts: list[list[Part]] = [[] for _ in weights]
    for members in _slabs([(w.shape[0], n) for w in weights], schemes):
        rows = [weights[i][a:b] for i, a, b in members]
        for (i, _, _), part in zip(members, solve(rows, begun, schemes[members[0][0]], sweeps=sweeps), strict=True):
            parts[i].append(part)
    return [_joined(own) for own in parts]


@dataclass(frozen=True)
class Square:
    """What weights that share an input are solved with: the square h [in, in] that holds their Hessian and its factor,
    its columns in `order`; or, where there is no factor, the Hessian as it was and the `reason`."""

    h: torch.Tensor
    order: torch.Tensor
    factored: Factored | None
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """Rows of a weight, done: lost and total, float64 [rows], squared output error and squared output; fallback: why
    they were rounded, or None."""

    weight: Weight
    lost: torch.Tensor
    total: torch.Tensor
    fallback: str | None = None


def begin(hessian: torch.Tensor, *, damp: float = 0.01, act_order: bool = True, sweeps: int = 1) -> Square:
    """The first part of `quantize_all`: order and factor, in the memory of the Hessian."""
    import torch

    from ..kernels import all_finite

    n = len(hessian)
    if not all_finite(hessian):
        raise QkitError(
            "the calibration statistics contain NaN or infinite values",
            "the model overflows on this text: check the checkpoint, or use --method rtn",
        )
    diagonal = hessian.diagonal()
    if not bool((diagonal > 0).any()):
        return Square(hessian, torch.arange(n, device=hessian.device), None, UNREACHED)
    # The factor is used from its last column to its first, so columns lie in the order opposite to that of the visits.
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
    else:
        order = torch.arange(n - 1, -1, -1, device=hessian.device)
    h = square.permute(hessian, order)
    factored, reason = factor(h, damp)
    if factored is None:
        square.permute(h, torch.argsort(order))
    return Square(h, order, factored, reason)


def solve(
    rows: Sequence[torch.Tensor],
    begun: Square,
    scheme: LayerSpec,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    sweeps: int = 1,
) -> list[Part]:
    """The second part of `quantize_all`, for rows of weights: one loop over the columns for all of them, since its cost
    is in the number of steps."""
    import torch

    from ..kernels import all_finite

    if not all(all_finite(w) for w in rows):
        raise QkitError("the weight contains NaN or infinite values", "the checkpoint is damaged")
    if begun.factored is None:
        return [_rounded(w, begun.h, scheme, begun.reason) for w in rows]
    q, lost, total = solve_rows(torch.cat(list(rows)), begun.h, begun.order, begun.factored, scheme, sweeps)
    parts, row = [], 0
    for w in rows:
        own = slice(row, row := row + len(w))
        parts.append(Part(q.rows(own.start, own.stop), lost[own], total[own]))
    return parts


def _slabs(shapes: Sequence[Shape], schemes: Sequence[LayerSpec]) -> Iterator[list[tuple[int, int, int]]]:
    """Rows that are solved together, as (weight, first row, end): of one scheme, and no more than a slab holds."""
    most = max(_LEAST_ROWS, _SLAB // shapes[0][1] // 16 * 16)
    for scheme in dict.fromkeys(schemes):
        members: list[tuple[int, int, int]] = []
        room = most
        for i, (out, _) in enumerate(shapes):
            done = 0 if schemes[i] == scheme else out
            while done < out:
                members.append((i, done, done + min(room, out - done)))
                done = members[-1][2]
                room -= done - members[-1][1]
                if not room:
                    yield members
                    members, room = [], most
        if members:
            yield members


def _joined(parts: Sequence[Part]) -> Quantized:
    """Rows of one weight, in order -> all of it."""
    lost = sum(float(part.lost.sum().clamp_min(0)) for part in parts)
    total = sum(float(part.total.sum().clamp_min(0)) for part in parts)
    error = lost / max(total, 1e-300)
    fallback = parts[0].fallback
    return Quantized(
        stack_rows([part.weight for part in parts]),
        "gptq" if fallback is None else "rtn",
        output_error=error if math.isfinite(error) else None,
        fallback=fallback,
    )


def _rounded(w: torch.Tensor, h: torch.Tensor, scheme: LayerSpec, reason: str) -> Part:
    """Nearest codes on a searched grid; the Hessian counts only in the error that is reported."""
    import torch

    from ..kernels import reference
    from ..kernels.codes import values_of, weight_of

    scale, zero = search_grid(w, torch.ones(w.shape[1], device=w.device), scheme)
    q = weight_of(reference.quantize(w, scale, zero, scheme.bits), scale, zero, scheme.bits)
    x = w.float()
    delta = x - values_of(q)
    lost, total = (
        (t * (t if reason == UNREACHED else t @ h)).sum(1, dtype=torch.float64).clamp_min_(0) for t in (delta, x)
    )
    return Part(q, lost, total, reason)
