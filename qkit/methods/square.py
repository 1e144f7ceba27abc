"""A Hessian and its Cholesky factor in one square buffer: at 28,672 inputs a square takes 3.3 GB.

The Hessian is what lies on and above the diagonal; below it, and on it, the factor takes its place. Everything is done
in panels and slabs, whose sizes are constants: they decide the order of sums, and so the last bits of a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PANEL = 512  # columns factored at a time
SLAB = 16 << 20  # numbers moved at a time: bounds what is held beside the square


def mirror(h: torch.Tensor) -> torch.Tensor:
    """What is above the diagonal of h [n, n] also below it, in place; returns its argument."""
    n = len(h)
    for a in range(0, n, _PANEL):
        b = min(a + _PANEL, n)
        upper = h[a:b, a:b].triu()
        h[a:b, a:b] = upper + upper.triu(1).T
        h[b:, a:b] = h[a:b, b:].T
    return h


def permute(h: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Symmetric h [n, n] -> h[order][:, order], in place; returns its argument."""
    n = len(h)
    step = max(1, SLAB // n)
    for a in range(0, n, step):
        h[a : a + step] = h[a : a + step].index_select(1, order)
    # What is above the diagonal of the result, of which the rows of a slab of columns are gathered.
    for a in range(0, n, step):
        h[:, a : a + step] = h[:, a : a + step].index_select(0, order)
    return h


def factor(h: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """Lower Cholesky factor L of symmetric h [n, n] with `added` [n] on its diagonal, in place: below the diagonal and
    on it. Returns the former diagonal of h, without `added`; or None, with h as it was, where it is not positive
    definite.

    Left-looking and blocked (Golub and Van Loan, Matrix Computations, 4.2.5)."""
    import torch

    n, diagonal = len(h), h.diagonal().clone()
    for a in range(0, n, _PANEL):
        b = min(a + _PANEL, n)
        done = h[a:b, :a]
        block = h[a:b, a:b].triu().T.contiguous()  # lower: below the diagonal nothing of h is overwritten until now
        block.diagonal().add_(added[a:b])
        block.addmm_(done, done.T, alpha=-1)
        lower, info = torch.linalg.cholesky_ex(block)
        pivots = lower.diagonal()
        if int(info) or not bool(torch.isfinite(pivots).all() & (pivots > 0).all()):
            h.diagonal().copy_(diagonal)
            mirror(h)
            return None
        h[a:b, a:b] = h[a:b, a:b].triu(1) + lower.tril()
        if b < n:
            rest = h[b:, a:b]
            rest.addmm_(h[b:, :a], done.T, alpha=-1)
            rest.copy_(torch.linalg.solve_triangular(lower.tril().T, rest, upper=True, left=False))
    return diagonal
