"""Random quantized weights, and what it means that two are the same."""

from __future__ import annotations

import torch

from qkit.spec.scheme import QTensor, Scheme, round_scale


def random_qtensor(out: int, in_: int, scheme: Scheme, seed: int = 0) -> QTensor:
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(in_)
    codes = torch.randint(0, scheme.max_code + 1, (out, in_), generator=g).to(torch.uint8)
    scale = round_scale(torch.randn(out, groups, generator=g), scheme)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(scheme.min_zero, scheme.max_code + 1, (out, groups), generator=g).to(torch.uint8)
    return QTensor(codes, scale, zero, scheme)


def same(a: QTensor, b: QTensor) -> bool:
    zeros = a.zero is b.zero is None or (a.zero is not None and b.zero is not None and torch.equal(a.zero, b.zero))
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros
