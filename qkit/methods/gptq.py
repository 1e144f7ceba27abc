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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..kernels.weight import Weight, stack_rows
from ..spec import LayerSpec
from . import square
from .base import Cost, Divided, Quantized, Shape

if TYPE_CHECKING:
    import torch

# Multiples of the scale that just spans a group. A 4-bit grid gains from clipping far more than from widening.
_MULTIPLES = tuple(0.6 + 0.025 * k for k in range(19))
_MAX_DAMP = 1.0  # of the mean diagonal; beyond this the Hessian says nothing that rounding does not know
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
    factored: _Factored | None
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
    factored, reason = _factor(h, damp)
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
    q, lost, total = _solve(torch.cat(list(rows)), begun.h, begun.order, begun.factored, scheme, sweeps)
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


@dataclass(frozen=True)
class _Factored:
    """What the loops over the columns need beside the square, in its order: `added` to the diagonal of the Hessian, and
    `pivots`, the diagonal of the factor, both [in]; of each block of columns that is visited, by its first, the
    `lower` triangle of the factor, and the symmetric `own` of the Hessian with what was added."""

    added: torch.Tensor
    pivots: torch.Tensor
    lower: Mapping[int, torch.Tensor]
    own: Mapping[int, torch.Tensor]


def _factor(h: torch.Tensor, damp: float) -> tuple[_Factored | None, str]:
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
            return _Factored(added, h.diagonal().clone(), lower, own), ""
        if damp >= _MAX_DAMP:
            return None, f"its calibration statistics are not positive definite, even damped by {damp:g} of the mean"
        damp = min(max(damp * 10, 1e-4), _MAX_DAMP)


def _solve(
    w: torch.Tensor, h: torch.Tensor, order: torch.Tensor, factored: _Factored, scheme: LayerSpec, sweeps: int
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


def _project(x: torch.Tensor, h: torch.Tensor, factored: _Factored, a: int, b: int) -> torch.Tensor:
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
    wt: torch.Tensor, h: torch.Tensor, factored: _Factored, grid: _Grid
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
    factored: _Factored,
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
