"""GPTQ (arXiv:2210.17323) in its error-feedback form: round column by column, push each error onto later columns.

With H = X^T X over the calibration inputs of a layer, the squared output error of rounding W to Q is
tr((W - Q) H (W - Q)^T). Factor H = U D U^T, U unit upper triangular: the error is the sum over columns j of
D_j |t_j - q_j|^2 with t_j = w_j + sum_{i<j} (w_i - q_i) U_ij. So round t_j, from left to right. This is the paper's
algorithm (section 3; the equivalence: QuIP, arXiv:2307.13304, theorem 6) with one Cholesky and no inverse.

Beyond the paper:
- Static groups with activation order: scales are fixed before the loop, columns are visited by falling
  diag(H), codes are stored in their own order, so g_idx stays trivial.
- Scales are searched, sign included, to minimize sum_j D_j (w_j - q_j)^2. D_j is what an error in column j costs
  *after* later columns have compensated it; diag(H), the usual weight, ignores the compensation.
- Coordinate descent over the codes afterwards: the loop never returns to a column, this does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..kernels.weight import Weight
from ..spec import LayerSpec
from .base import Cost, Method, Quantized, Shape

if TYPE_CHECKING:
    import torch

# Multiples of the scale that just spans a group. A 4-bit grid gains from clipping far more than from widening.
_MULTIPLES = tuple(0.6 + 0.025 * k for k in range(19))
_MAX_DAMP = 1.0  # of the mean diagonal; beyond this the Hessian says nothing that rounding does not know
UNREACHED = "no calibration token reached it"


class Gptq(Method):
    """Needs the Hessian of a layer's inputs. Options of `quantize_all`: damp, act_order, sweeps."""

    name: ClassVar[str] = "gptq"
    needs: ClassVar[str | None] = "hessian"

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        return quantize_all(weights, statistic, specs, **options)

    def cost(self, shapes: Sequence[Shape], tokens: float) -> Cost:
        in_ = shapes[0][1]
        out = sum(shape[0] for shape in shapes)
        # Feedback loop and one descent sweep each touch every weight with every column; two products for the error.
        flops = 1.1 * tokens * in_**2 + 8.0 * out * in_**2
        # Four squares while the Hessian is factored; three, and the weights seven times in float32, in the solve.
        return Cost(flops, max(16 * in_**2, 12 * in_**2 + 28 * out * in_))


def quantize(
    w: torch.Tensor,
    hessian: torch.Tensor,
    scheme: LayerSpec,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    sweeps: int = 1,
) -> Quantized:
    """`quantize_all` for one weight."""
    return quantize_all([w], hessian, [scheme], damp=damp, act_order=act_order, sweeps=sweeps)[0]


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
    hessian  float32 [in, in], symmetric: X^T X over the calibration tokens (any positive multiple of it)
    damp     added to the diagonal, as a fraction of its mean; grown tenfold until the factorization succeeds,
             up to 1. Where it never does, or the Hessian is zero, the weights are rounded (searched scales) and
             `fallback` says why
    act_order  visit columns by falling diag(hessian)
    sweeps   coordinate-descent passes over the codes after the loop
    Raises QkitError for NaN or infinity in a weight or in the Hessian, ValueError for shapes that do not match.
    """
    import torch

    n = hessian.shape[0]
    for w, scheme in zip(weights, schemes, strict=True):
        if w.ndim != 2 or w.shape[1] != n or hessian.shape != (n, n):
            raise ValueError(f"weight {list(w.shape)} and hessian {list(hessian.shape)} do not match")
        scheme.groups(n)
        if not bool(torch.isfinite(w).all()):
            raise QkitError("the weight contains NaN or infinite values", "the checkpoint is damaged")
    if not bool(torch.isfinite(hessian).all()):
        raise QkitError(
            "the calibration statistics contain NaN or infinite values",
            "the model overflows on this text: check the checkpoint, or use --method rtn",
        )
    h = hessian.float()
    diagonal = h.diagonal()
    if not bool((diagonal > 0).any()):
        return [_rounded(w, h, scheme, UNREACHED) for w, scheme in zip(weights, schemes, strict=True)]
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n, device=h.device)
    h = h[order][:, order]
    # A column no token ever excites: any value is right, the nearest code is the natural one. A zero row and
    # column with a positive diagonal gives just that: no feedback in or out.
    diagonal = h.diagonal()
    mean = diagonal.mean()
    dead = diagonal <= 0
    factor, used, reason = _factor(h, dead, float(mean), damp)
    if factor is None:
        back = torch.argsort(order)
        return [_rounded(w, h[back][:, back], s, reason) for w, s in zip(weights, schemes, strict=True)]
    results: list[Quantized | None] = [None] * len(weights)
    for scheme in dict.fromkeys(schemes):
        # One loop over the columns for all weights of a scheme: its cost is in the number of steps.
        members = [i for i, other in enumerate(schemes) if other == scheme]
        w = torch.cat([weights[i] for i in members])
        q, lost, total = _solve(w, h, order, factor, used * mean, dead, scheme, sweeps)
        row = 0
        for i in members:
            part = slice(row, row + weights[i].shape[0])
            row = part.stop
            mine = q.rows(part.start, part.stop)
            error = float(lost[part].sum().clamp_min(0) / total[part].sum().clamp_min(1e-300))
            results[i] = Quantized(mine, "gptq", output_error=error)
    return [result for result in results if result is not None]


def _solve(
    w: torch.Tensor,
    h: torch.Tensor,
    order: torch.Tensor,
    factor: tuple[torch.Tensor, torch.Tensor],
    damping: torch.Tensor,
    dead: torch.Tensor,
    scheme: LayerSpec,
    sweeps: int,
) -> tuple[Weight, torch.Tensor, torch.Tensor]:
    """(quantized, lost, total), the latter two float64 [out]: squared output error and squared output, undamped.

    h, factor and dead are in visiting order, w is not."""
    import torch

    from ..kernels.codes import weight_of

    feedback, cost = factor
    column_cost = torch.empty_like(cost)
    column_cost[order] = cost
    scale, zero = search_grid(w, column_cost, scheme)
    wt = w.float().T[order].contiguous()  # [in, out]: a column of W is contiguous
    grid = _Grid(scale, zero, scheme, order, w.shape[1])
    codes = _round_with_feedback(wt, feedback, grid)
    error = wt - grid.values(codes)
    for _ in range(sweeps):
        _descend(codes, error, h, damping, dead, grid)
    total = ((h @ wt).mul_(wt)).sum(0, dtype=torch.float64)
    lost = ((h @ error).mul_(error)).sum(0, dtype=torch.float64)
    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[order] = codes.to(torch.uint8)
    return weight_of(stored.T.contiguous(), scale, zero, scheme.bits), lost, total


def _factor(
    h: torch.Tensor, dead: torch.Tensor, mean: float, damp: float
) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, float, str]:
    """((U, D), damping used, "") with h + damping = U diag(D) U^T, U unit upper triangular; or (None, _, reason)."""
    import torch

    while True:
        damped = h.flip(0, 1)
        damped.diagonal().add_(damp * mean + mean * dead.flip(0))
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        upper = lower.flip(0, 1)
        del lower
        pivots = upper.diagonal().clone()
        if int(info) == 0 and bool(torch.isfinite(pivots).all()) and bool((pivots > 0).all()):
            return (upper.div_(pivots), pivots.square()), damp, ""
        if damp >= _MAX_DAMP:
            reason = f"its calibration statistics are not positive definite, even damped by {damp:g} of the mean"
            return None, damp, reason
        damp = min(max(damp * 10, 1e-4), _MAX_DAMP)


class _Grid:
    """Scales and zero points per visited column, so that the loop reads one row."""

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor | None, scheme: LayerSpec, order: torch.Tensor, n: int):
        group = order // (n // scale.shape[1])
        self.scale = scale.float().T[group].contiguous()  # [in, out]
        self.zero = None if zero is None else zero.float().T[group].contiguous()
        self.mid, self.top = float(scheme.mid), float(scheme.max_code)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - (self.mid if self.zero is None else self.zero)) * self.scale


def _round_with_feedback(wt: torch.Tensor, feedback: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """Codes (float [in, out], visiting order) of wt [in, out]; feedback = U."""
    import torch

    from ..kernels import gptq as kernel

    n = wt.shape[0]
    codes, errors = torch.empty_like(wt), torch.empty_like(wt)
    for a in range(0, n, kernel.MAX_COLUMNS):
        b = min(a + kernel.MAX_COLUMNS, n)
        # What later columns can make up for is the error against the *original* weight.
        target = torch.addmm(wt[a:b], feedback[:a, a:b].T, errors[:a])
        zero = None if grid.zero is None else grid.zero[a:b]
        codes[a:b], errors[a:b] = kernel.feedback(
            target, wt[a:b], feedback[a:b, a:b], grid.scale[a:b], zero, grid.mid, grid.top
        )
    return codes


def _descend(
    codes: torch.Tensor, error: torch.Tensor, h: torch.Tensor, damping: torch.Tensor, dead: torch.Tensor, grid: _Grid
) -> None:
    """One pass of cyclic coordinate descent over the codes, in place; error = wt - values(codes), kept up to date.

    Each code moves to the minimum of the damped objective given all the others, so the objective never rises."""
    from ..kernels import gptq as kernel

    n = codes.shape[0]
    diagonal = h.diagonal() + damping + dead * h.diagonal().mean()
    gradient = h @ error + (diagonal - h.diagonal()).unsqueeze(1) * error
    for a in range(0, n, kernel.MAX_COLUMNS):
        b = min(a + kernel.MAX_COLUMNS, n)
        steps = kernel.descend(gradient[a:b], h[a:b, a:b], diagonal[a:b], grid.scale[a:b], codes[a:b], grid.top)
        error[a:b] -= steps
        if b < n:
            gradient[b:].addmm_(h[b:, a:b], steps, alpha=-1)


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


def _rounded(w: torch.Tensor, h: torch.Tensor, scheme: LayerSpec, reason: str) -> Quantized:
    """Nearest codes on a searched grid; the Hessian counts only in the error that is reported."""
    import torch

    from ..kernels import reference
    from ..kernels.codes import values_of, weight_of

    scale, zero = search_grid(w, torch.ones(w.shape[1], device=w.device), scheme)
    codes = reference.quantize(w, scale, zero, scheme.bits)
    q = weight_of(codes, scale, zero, scheme.bits)
    w = w.float()
    delta = w - values_of(q)
    if reason == UNREACHED:
        total, lost = float(w.square().sum()), float(delta.square().sum())
    else:
        total, lost = float(((w @ h) * w).sum()), float(((delta @ h) * delta).sum())
    error = max(lost, 0.0) / total if total > 0 else 0.0
    return Quantized(q, "rtn", output_error=error, fallback=reason)
