"""Random quantized weights, and what it means that two are the same."""

from __future__ import annotations

import torch

from qkit.kernels import reference
from qkit.kernels.codes import weight_of
from qkit.kernels.weight import Weight
from qkit.spec import LayerSpec
from qkit.spec.dtypes import torch_dtype


def random_weight(out: int, in_: int, spec: LayerSpec, seed: int = 0) -> Weight:
    g = torch.Generator().manual_seed(seed)
    groups = spec.groups(in_)
    codes = torch.randint(0, spec.max_code + 1, (out, in_), generator=g).to(torch.uint8)
    scale = reference.round_scale(torch.randn(out, groups, generator=g), torch_dtype(spec.scale_dtype))
    zero = None
    if not spec.symmetric:
        zero = torch.randint(spec.min_zero, spec.max_code + 1, (out, groups), generator=g).to(torch.uint8)
    return weight_of(codes, scale, zero, spec.bits)


def same(a: Weight, b: Weight) -> bool:
    zeros = a.zero is b.zero is None or (a.zero is not None and b.zero is not None and torch.equal(a.zero, b.zero))
    return torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale) and zeros
