"""The inner loops of GPTQ: the weighted scale search and the two that visit column after column.

In C++ for CPU tensors where the library is there, else in torch, on any device: a loop over the columns in Python costs
a few operations a column. Column matrices are float32 [columns, out], at most `MAX_COLUMNS` columns at a time; the last
column is visited first, which is the order in which a lower triangular factor is used.
"""

from __future__ import annotations

import torch

from qkit.spec.dtypes import torch_dtype

from . import _native, reference
from .cpu import lib
from .errors import NonFiniteError, ScaleOverflowError

MAX_COLUMNS = 128
_SLAB = 1 << 20  # weights the torch search takes at a time: bounds its temporaries


def search(
    w: torch.Tensor,
    cost: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    scale_dtype: str,
    min_zero: int,
    multipliers: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Per group the scale, out of multiples of the one that spans it, of least sum cost * (w - nearest value)^2.

    w float [out, in]; cost float [in], not negative. A negative multiple swaps the ends of a symmetric grid. An
    all-zero group gets scale 1. Returns scale [out, groups] as stored and zero uint8, None where symmetric. Raises
    NonFiniteError, and ScaleOverflowError where no multiple fits the stored type.
    """
    if cost.shape != (w.shape[1],) or w.shape[1] % groups:
        raise ValueError(f"w {tuple(w.shape)}, cost {tuple(cost.shape)} and {groups} groups do not fit")
    cost = cost.float().contiguous()
    dtype = torch_dtype(scale_dtype)
    if _native(w) and bits in (4, 8):
        return lib.gptq_search(w.contiguous(), cost, bits, groups, symmetric, dtype, min_zero, multipliers)
    parts = [
        _search(rows, cost, bits, groups, symmetric, dtype, min_zero, multipliers)
        for rows in w.split(max(1, _SLAB // w.shape[1]))
    ]
    return torch.cat([s for s, _ in parts]), None if symmetric else torch.cat([z for _, z in parts])


def _search(
    w: torch.Tensor,
    cost: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    dtype: torch.dtype,
    min_zero: int,
    multipliers: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(w).all()):
        raise NonFiniteError("the weight contains NaN or infinity")
    top, mid = (1 << bits) - 1, 1 << (bits - 1)
    w = w.float().view(w.shape[0], groups, -1)
    cost = cost.view(groups, -1)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    span = torch.where(high > -low, high, low) / -mid if symmetric else (high - low) / top
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    best = torch.full_like(span, float("inf"), dtype=torch.float64)
    chosen = torch.zeros_like(span)
    zero = torch.full_like(span, float(mid))
    for m in multipliers:
        s = reference.round_scale(span * m, dtype).float()
        usable = torch.isfinite(s) & (s.abs() >= least)
        s = torch.where(usable, s, 1.0)
        z = torch.full_like(s, float(mid)) if symmetric else (-(low * m) / s).clamp(min_zero, top).round_()
        t, bound = w / s.unsqueeze(-1), z.unsqueeze(-1)
        e = t - torch.clamp(t, -bound, top - bound).round_()
        loss = (e.square_() * cost).sum(-1, dtype=torch.float64) * s.double().square()
        better = usable & (loss < best)
        best = torch.where(better, loss, best)
        chosen = torch.where(better, s, chosen)
        zero = torch.where(better, z, zero)
    if bool(((chosen == 0) & (span.abs() >= 1)).any()):
        raise ScaleOverflowError("a scale overflows its stored type")
    return torch.where(chosen == 0, 1.0, chosen).to(dtype), zero.to(torch.uint8)


def feedback(
    target: torch.Tensor,
    weight: torch.Tensor,
    lower: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    mid: float,
    top: float,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Round one block of columns, from the last to the first, each after the errors of those visited before it, into
    `codes` and `errors`, contiguous [columns, out].

    target  what each column should be, the errors of blocks visited before included
    weight  the columns themselves: errors = weight - value, which columns visited later are to make up for
    lower   [columns, columns], of which what is below the diagonal counts: row j holds column j's share in those before
    scale, zero (None: mid)  [columns, out]; codes are 0 .. top
    """
    _check_columns(target, weight, lower, scale, zero)
    if _native(target, weight, lower, scale, zero, codes, errors):
        lib.gptq_feedback(target, weight, lower, scale, zero, mid, top, codes, errors)
        return
    target = target.clone()
    for j in reversed(range(len(weight))):
        z = torch.full_like(scale[j], mid) if zero is None else zero[j]
        level = torch.clamp(target[j] / scale[j], -z, top - z).round_()
        codes[j] = level + z
        errors[j] = weight[j] - level * scale[j]
        target[:j] += lower[j, :j].unsqueeze(1) * errors[j]


def descend(
    gradient: torch.Tensor,
    h: torch.Tensor,
    diagonal: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    top: float,
) -> torch.Tensor:
    """One block of columns of cyclic coordinate descent, from the last to the first: each code moves to the objective's
    least given the others.

    gradient [columns, out]: H error; h [columns, columns] symmetric; diagonal [columns] float. codes [columns, out]
    are changed in place; returns the steps the values took, [columns, out].
    """
    _check_columns(gradient, codes, h, scale, None)
    if _native(gradient, h, diagonal, scale, codes) and codes.is_contiguous():
        return lib.gptq_descend(gradient, h, diagonal.contiguous(), scale, codes, top)
    gradient, steps = gradient.clone(), torch.empty_like(codes)
    for j in reversed(range(len(codes))):
        wanted = (gradient[j] / (scale[j] * diagonal[j])).clamp_(-1e6, 1e6)
        moved = (wanted + codes[j]).clamp_(0, top).round_()
        steps[j] = (moved - codes[j]) * scale[j]
        codes[j] = moved
        gradient[:j] -= h[j, :j].unsqueeze(1) * steps[j]
    return steps


def _check_columns(
    first: torch.Tensor, second: torch.Tensor, square: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    columns = len(first)
    same = first.shape == second.shape == scale.shape and (zero is None or zero.shape == first.shape)
    if not same or square.shape != (columns, columns) or columns > MAX_COLUMNS:
        raise ValueError(
            f"blocks {tuple(first.shape)}, {tuple(second.shape)}, {tuple(scale.shape)} and {tuple(square.shape)} "
            f"do not fit, or exceed {MAX_COLUMNS} columns"
        )
    for t in (first, second, square, scale, zero):
        if t is not None and t.dtype != torch.float32:
            raise TypeError(f"expected float32, got {t.dtype}")
