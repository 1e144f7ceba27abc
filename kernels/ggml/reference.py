"""Weights -> codes and scales of a block type, in torch: what the C++ (cpu/ggml.h) equals bit for bit; the fallback.

Sums run over the values of a sub-block in order, in float32, each product rounded by itself. For each sub-block scales
around the one that spans it are tried; of each, the least-squares scale (and minimum) for the codes that it gives. In
a super-block the integers nearest to these and their neighbours are then compared by what they really lose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .grids import BlockGrid

_ROWS = 1 << 18  # values at a time: bounds the temporaries


@dataclass(frozen=True)
class Fields:
    """What the blocks of a matrix [rows, in] hold, before it is packed.

    codes           uint8 [rows, in]
    d               float16 [rows, blocks]; of a power of two int16, the exponent's byte
    dmin            float16 [rows, blocks], what is subtracted (Q4_1, Q5_1: added); None where the grid has no minimum
    scales, minima  int16 [rows, sub-blocks], None where they are no integers
    lost, total     the sum of squared errors, whatever their weights, and the sum of squares
    """

    codes: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    lost: float = 0.0
    total: float = 0.0


def fit(grid: BlockGrid, w: torch.Tensor, weight: torch.Tensor | None) -> Fields:
    """w float [rows, in], finite; weight float32 [in], what an error in each column costs, or None."""
    parts = [_Rows(grid, rows.float(), weight).fit() for rows in w.split(max(1, _ROWS // max(1, w.shape[1])))]
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> torch.Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces)

    codes, d = joined("codes"), joined("d")
    assert codes is not None and d is not None
    lost, total = (sum(getattr(part, name) for part in parts) for name in ("lost", "total"))
    return Fields(codes, d, joined("dmin"), joined("scales"), joined("minima"), lost, total)


def _sum(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x != 0, 1.0 / x, 0.0)


def _largest(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The end that is farther from zero, signed."""
    return torch.where(-low > high, low, high)


class _Rows:
    """Some rows on one grid. x float32 [sub, rows, sub-blocks]; w, what an error costs, of the same shape."""

    def __init__(self, grid: BlockGrid, x: torch.Tensor, weight: torch.Tensor | None):
        self.grid = grid
        self.rows, self.n = x.shape
        self.x = x.view(self.rows, -1, grid.sub).permute(2, 0, 1).contiguous()
        self.w = torch.ones_like(self.x) if weight is None else weight.view(-1, grid.sub).T[:, None].expand_as(self.x)
        self.targets = grid.tried(weight is not None)
        self.levels = torch.tensor(grid.levels, dtype=torch.float32)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2

    def level(self, v: torch.Tensor) -> torch.Tensor:
        if self.grid.levels:
            return self.levels[torch.bucketize(v, self.between)]
        return v.clamp(self.grid.low, self.grid.high).round_()

    def symmetric(self) -> torch.Tensor:
        """The scale of each sub-block, of either sign, of least weighted error."""
        extreme = _largest(self.x.amin(0), self.x.amax(0))
        inverse = _inverse(extreme)
        scale, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
        for target in self.targets:
            q = self.level(self.x * (inverse * target))
            wq = self.w * q
            xq, qq = _sum(wq * self.x), _sum(wq * q)
            s = torch.where(qq > 0, xq / qq, 0.0)
            gain = s * xq
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better, s, scale)
        return scale

    def affine(self, with_sign: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum) of each sub-block; with_sign: the minimum may be below zero."""
        x, w = self.x, self.w
        low, high = x.amin(0), x.amax(0)
        if not with_sign:
            low = low.clamp(max=0.0)
        span = high - low
        sw, sx = _sum(w), _sum(w * x)
        scale, offset, best = torch.zeros_like(low), low, torch.full_like(low, -float("inf"))
        inverse = torch.where(span > 0, 1.0 / span, 0.0)
        for target in (*self.targets, None):  # None: once more, from the best
            start = low if target is not None else offset
            by = inverse * target if target is not None else torch.where(scale > 0, 1.0 / scale, 0.0)
            q = self.level((x - start) * by)
            wq = w * q
            sq, sqq, sxq = _sum(wq), _sum(wq * q), _sum(wq * x)
            det = sw * sqq - sq * sq
            good = det > 0  # else all codes are the same
            s = torch.where(good, (sw * sxq - sx * sq) / det, 0.0)
            m = torch.where(good, (sqq * sx - sq * sxq) / det, 0.0)
            if not with_sign:
                alone = (m > 0) | ~good
                m = torch.where(alone, 0.0, m)
                s = torch.where(alone, torch.where(sqq > 0, sxq / sqq, 0.0), s)
            gain = torch.where(s > 0, s * sxq + m * sx, -float("inf"))
            better = gain > best
            best = torch.where(better, gain, best)
            scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
        return scale, 0.0 - offset

    def loss(self, scale: torch.Tensor, minimum: torch.Tensor | float) -> torch.Tensor:
        """What is lost in each sub-block with these as they are stored."""
        e = self.x - (scale * self.level((self.x + minimum) * _inverse(scale)) - minimum)
        return _sum(self.w * e * e)

    def codes(self, scale: torch.Tensor, minimum: torch.Tensor | float) -> torch.Tensor:
        v = (self.x + minimum) * _inverse(scale)
        self.lost = (self.x - (scale * self.level(v) - minimum)).square_()
        found = torch.bucketize(v, self.between) if self.grid.levels else self.level(v) - self.grid.low
        return found.to(torch.uint8).permute(1, 2, 0).reshape(self.rows, self.n)

    def fit(self) -> Fields:
        fields = self._fit()
        return replace(
            fields, lost=float(self.lost.sum(dtype=torch.float64)), total=float(self.x.double().square().sum())
        )

    def _fit(self) -> Fields:
        if self.grid.scales:
            return self._super()
        if self.grid.power:
            return self._power()
        if self.grid.affine:
            scale, minimum = self.affine(with_sign=True)
            d, dmin = scale.half(), (0.0 - minimum).half()
            return Fields(self.codes(d.float(), 0.0 - dmin.float()), d, dmin)
        d = self.symmetric() if self.targets else self.x.abs().amax(0) * (1.0 / self.grid.high)
        return Fields(self.codes(d.half().float(), 0.0), d.half())

    def _power(self) -> Fields:
        """The largest weight in the upper half of the grid, or a power of two beside."""
        exponent = (self.x.abs().amax(0).view(torch.int32) >> 23).float()
        best = chosen = exponent
        for step in (-1, 0, 1):
            e = (exponent + (step - 2)).clamp(2, 254)
            lost = self.loss(_power_of_two(e - 1), 0.0)
            better = lost < best if step >= 0 else torch.ones_like(lost, dtype=torch.bool)
            best, chosen = torch.where(better, lost, best), torch.where(better, e, chosen)
        return Fields(self.codes(_power_of_two(chosen - 1), 0.0), chosen.to(torch.int16))

    def _super(self) -> Fields:
        assert self.grid.scales is not None
        least, most = self.grid.scales
        affine, per = self.grid.affine, self.grid.per_scale
        scale, minimum = self.affine(with_sign=False) if affine else (self.symmetric(), None)

        def of_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            view = x.view(self.rows, -1, per)
            return view.amin(-1).clamp(max=0.0), view.amax(-1).clamp(min=0.0)

        def spread(d: torch.Tensor) -> torch.Tensor:
            return d.float().repeat_interleave(per, 1)

        low, high = of_block(scale)
        d = (high * (1.0 / most) if affine else _largest(low, high) * (1.0 / least)).half()
        step = spread(d)
        near = (scale * _inverse(step)).clamp(least, most).round_()
        dmin, step_m, near_m = None, torch.zeros(()), torch.zeros_like(near)
        if minimum is not None:
            dmin = (of_block(minimum)[1] * (1.0 / most)).half()
            step_m = spread(dmin)
            near_m = (minimum * _inverse(step_m)).clamp(0, most).round_()
        best, sc, mn = torch.zeros_like(near), near, near_m
        for i in range(9 if affine else 3):
            s = (near + (0, -1, 1)[i // 3 if affine else i]).clamp(least, most)
            m = (near_m + (0, -1, 1)[i % 3]).clamp(0, most) if affine else near_m
            lost = self.loss(step * s, step_m * m)
            better = lost < best if i else torch.ones_like(lost, dtype=torch.bool)
            best = torch.where(better, lost, best)
            sc, mn = torch.where(better, s, sc), torch.where(better, m, mn)
        codes = self.codes(step * sc, step_m * mn)
        return Fields(codes, d, dmin, sc.to(torch.int16), mn.to(torch.int16) if affine else None)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**(exponent - 127), exponent a whole float32 above 0."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)
