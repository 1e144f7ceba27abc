"""Codes <-> `Weight` <-> values: what methods make, formats store and kernels multiply by is one type."""

from __future__ import annotations

from dataclasses import replace

import torch

from qkit.spec.ggml import GGML

from . import dequantize, pack, reference, unpack
from .ggml import dequantize as decode_blocks
from .weight import FLOATS, Blocks, Weight

_SLAB = 1 << 17  # weights compared at a time: 1 MiB in float64


def weight_of(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, kind: str = "int"
) -> Weight:
    """codes uint8 [out, in], each below 2**bits -> the weight; scale and zero as in `Weight`, shared.

    Integers of 2 and 3 bits are held as 4, with their zero points beside them: kernels need know nothing of them."""
    if kind == "int" and bits in (2, 3):
        zero = (
            torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8, device=scale.device) if zero is None else zero
        )
        return Weight(pack(codes, 4), scale, zero, 4, codes.shape[1])
    return Weight(pack(codes, bits), scale, zero, bits, codes.shape[1], kind)


def codes_of(weight: Weight) -> torch.Tensor:
    """The weight's codes, uint8 [out, in], unpacked anew."""
    return unpack(weight.packed, weight.bits, weight.in_features)


def signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes around 128, which are used up -> int8 around 0."""
    return codes.bitwise_xor_(128).view(torch.int8)


def unsigned(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `signed`; the values stay as they are."""
    return values.view(torch.uint8) ^ 128


def values_of(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[out, in] in `dtype`: computed in float32, rounded once."""
    if isinstance(weight, Blocks):
        out = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
        decode_blocks(weight.packed.contiguous().view(-1), GGML[weight.block], out.view(-1))
        return out
    if weight.order is not None:
        columns = values_of(replace(weight, order=None), dtype)
        out = torch.empty_like(columns)
        out[:, weight.order] = columns
        return out
    weight = weight.plain()
    if weight.kind == "int" and dtype in FLOATS:
        return dequantize(weight.packed, weight.scale, weight.zero, weight.bits, weight.in_features, dtype)
    return reference.dequantize_weight(weight, dtype)


def squared_error(weight: torch.Tensor, q: Weight) -> tuple[float, float]:
    """(||W - Wq||^2, ||W||^2), accumulated in float64, a slab of rows at a time: no whole copy is made."""
    lost = total = 0.0
    q = q.plain()
    step = max(1, _SLAB // max(1, weight.shape[1]))
    for a in range(0, weight.shape[0], step):
        w = weight[a : a + step].double()
        total += float(w.square().sum())
        lost += float((w - values_of(q.rows(a, a + step)).double()).square_().sum())
    return lost, total
