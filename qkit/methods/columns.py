"""The loops of GPTQ over the columns of a slab of rows: scales, rounding with feedback, descent over the codes.

`gptq` says what is minimized; here it is done, with the Hessian and its factor in one square (`square`), whose columns
lie in the order opposite to that of the visits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..kernels.weight import Weight
from ..spec import LayerSpec
from . import square

if TYPE_CHECKING:
    import torch

# Multiples of the scale that just spans a group. A 4-bit grid gains from clipping far more than from widening.
_MULTIPLES = tuple(0.6 + 0.025 * k for k in range(19))
_MAX_DAMP = 1.0  # of the mean diagonal; beyond this the Hessian says nothing that rounding does not know


@dataclass(frozen=True)
class Factored:
    """What the loops over the columns need beside the square, in its order: `added` to the diagonal of the Hessian, and
    `pivots`, the diagonal of the factor, both [in]; of each block of columns that is visited, by its first, the
    `lower` triangle of the factor, and the symmetric `own` of the Hessian with what was added."""

    added: torch.Tensor
    pivots: torch.Tensor
    lower: Mapping[int, torch.Tensor]
    own: Mapping[int, torch.Tensor]


def factor(h: torch.Tensor, damp: float) -> tuple[Factored | None, str]:
    """The factor, in place (`square.factor`); or (None, reason), and h as it was."""
    import torch

    mean = h.diagonal().mean()
    # A column no token ever excites: any value is right, the nearest code is the natural one. A zero row and
    # column with a positive diagonal gives just that: no feedback in or out.
    dead = mean * (h.diagonal() <= 0)
    while True:
        added = damp * mean + dead
        diagonal = square.factor(h, added)
        if diagonal is not None:
            lower, own = {}, {}
            for a, b in _blocks(len(h)):
                upper = h[a:b, a:b].triu(1)
                lower[a] = h[a:b, a:b].tril()
                own[a] = upper + upper.T + torch.diag(diagonal[a:b] + added[a:b])
            return Factored(added, h.diagonal().clone(), lower, own), ""
        if damp >= _MAX_DAMP:
            return None, f"its calibration statistics are not positive definite, even damped by {damp:g} of the mean"
        damp = min(max(damp * 10, 1e-4), _MAX_DAMP)


def solve_rows(
    w: torch.Tensor, h: torch.Tensor, order: torch.Tensor, factored: Factored, scheme: LayerSpec, sweeps: int
) -> tuple[Weight, torch.Tensor, torch.Tensor]:
    """(quantized, lost, total), the latter two float64 [out]: squared output error and squared output, undamped.

    h and factored are in the square's order, w is not. The damped error of any E = W - Q is |L^T E|^2 a row."""
    import torch

    from ..kernels.codes import weight_of

    column_cost = torch.empty_like(factored.pivots)
    column_cost[order] = factored.pivots.square()
    scale, zero = search_grid(w, column_cost, scheme)
    grid = _Grid(scale, zero, scheme, order, w.shape[1])
    wt = w.T.index_select(0, order).float()  # [in, out]: a column of W is contiguous
    total = _squared(wt, wt, factored.added.neg())
    for a, b in _blocks(len(wt)):
        total += _squared(projected := _project(wt, h, factored, a, b), projected)
    codes, error, projected, lost = _round_with_feedback(wt, h, factored, grid)
    del wt
    for sweep in range(sweeps):
        if sweep:
            for a, b in _blocks(len(error)):
                projected[a:b] = _project(error, h, factored, a, b)
        lost += _descend(codes, error, projected, h, factored, grid)
    lost -= _squared(error, error, factored.added)
    del error, projected
    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[order] = codes.to(torch.uint8)
    del codes
    return weight_of(stored.T.contiguous(), scale, zero, scheme.bits), lost, total


def _project(x: torch.Tensor, h: torch.Tensor, factored: Factored, a: int, b: int) -> torch.Tensor:
    """Rows a .. b of L^T x, x [in, out]."""
    return (factored.lower[a].T @ x[a:b]).addmm_(h[b:, a:b].T, x[b:])


def _squared(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """sum_j weights_j x_j y_j, by default with weights of 1, float64 [out]; x and y [columns, out], weights [columns].

    A block of columns is summed in float32: in float64 only the sums of blocks are added."""
    import torch

    found = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for a, b in _blocks(len(x)):
        product = x[a:b] * y[a:b]
        found += product.sum(0) if weights is None else weights[a:b] @ product
    return found


class _Grid:
    """Scales and zero points of a block of columns, in the square's order."""

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor | None, scheme: LayerSpec, order: torch.Tensor, n: int):
        self.group = order // (n // scale.shape[1])
        self.scales = scale.float().T.contiguous()  # [groups, out]
        self.zeros = None if zero is None else zero.float().T.contiguous()
        self.mid, self.top = float(scheme.mid), float(scheme.max_code)

    def scale(self, a: int, b: int) -> torch.Tensor:
        return self.scales.index_select(0, self.group[a:b])

    def zero(self, a: int, b: int) -> torch.Tensor | None:
        return None if self.zeros is None else self.zeros.index_select(0, self.group[a:b])


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """(first, end) of blocks of columns, in the order in which they are visited."""
    from ..kernels.gptq import MAX_COLUMNS

    for b in range(n, 0, -MAX_COLUMNS):
        yield max(0, b - MAX_COLUMNS), b


def _round_with_feedback(
    wt: torch.Tensor, h: torch.Tensor, factored: Factored, grid: _Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, E = wt - values, L^T E, all float [in, out]; |L^T E|^2, float64 [out]) of wt [in, out]."""
    import torch

    from ..kernels import gptq as kernel

    codes, error, projected = (torch.empty_like(wt) for _ in range(3))
    lost = torch.zeros(wt.shape[1], dtype=torch.float64, device=wt.device)
    for a, b in _blocks(len(wt)):
        # What columns visited later can make up for is the error against the *original* weight.
        before = torch.mm(h[b:, a:b].T, error[b:], out=projected[a:b])
        pivots, lower = factored.pivots[a:b, None], factored.lower[a]
        target = torch.addcdiv(wt[a:b], before, pivots)
        scale, zero = grid.scale(a, b), grid.zero(a, b)
        kernel.feedback(target, wt[a:b], lower / pivots.T, scale, zero, grid.mid, grid.top, codes[a:b], error[a:b])
        lost += _squared(before.addmm_(lower.T, error[a:b]), before)
    return codes, error, projected, lost


def _descend(
    codes: torch.Tensor,
    error: torch.Tensor,
    projected: torch.Tensor,
    h: torch.Tensor,
    factored: Factored,
    grid: _Grid,
) -> torch.Tensor:
    """One pass of cyclic coordinate descent over the codes, in place; error = wt - values(codes) is kept up to date.
    Returns by how much the damped objective changes, float64 [out].

    Each code moves to the minimum of the damped objective given all the others, so the objective never rises. Its
    gradient is L (L^T E), and what the steps S so far changed in it: of `projected` = L^T E the rows that were visited
    hold -S, so that one row of the square, factor and Hessian, gives both."""
    import torch

    from ..kernels import gptq as kernel

    changed = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
    for a, b in _blocks(len(codes)):
        gradient = factored.lower[a] @ projected[a:b]
        gradient.addmm_(h[a:b, :a], projected[:a])
        gradient.addmm_(h[a:b, b:], projected[b:])
        own = factored.own[a]
        steps = kernel.descend(gradient, own, own.diagonal(), grid.scale(a, b), codes[a:b], grid.top)
        changed += _squared(gradient.mul_(-2).addmm_(own, steps), steps)
        error[a:b] -= steps
        torch.neg(steps, out=projected[a:b])
    return changed


def search_grid(
    w: torch.Tensor, column_cost: torch.Tensor, scheme: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The (scale, zero) [out, groups] of least sum_j column_cost_j (w_j - nearest grid value)^2, group by group.

    Candidates are multiples of the scale that spans the group; for a symmetric scheme of either sign, so that
    the largest weight may land on either end of the grid. Scales are rounded as stored before they are judged.
    w float [out, in]; column_cost float [in], nonnegative. Raises QkitError where no candidate fits scale_dtype.
    """
    import torch

    from .. import kernels
    from ..kernels import gptq as kernel

    groups = scheme.groups(w.shape[1])
    cost = column_cost.float().view(groups, -1)
    # Columns that cost nothing still break ties, and decide where a whole group costs nothing.
    cost = cost + 1e-6 * cost.mean().clamp_min(torch.finfo(torch.float32).tiny)
    # Only ratios count within a group: keep them in float32's range.
    cost = (cost / cost.amax(1, keepdim=True)).view(-1)
    multiples = tuple(m for k in _MULTIPLES for m in ((k, -k) if scheme.symmetric else (k,)))
    try:
        return kernel.search(
            w, cost, scheme.bits, groups, scheme.symmetric, scheme.scale_dtype, scheme.min_zero, multiples
        )
    except kernels.ScaleOverflowError as error:
        raise QkitError(
            f"the weight's range does not fit {scheme.scale_dtype} scales", "use a format with bfloat16 scales"
        ) from error
