"""The torch oracle every kernel is tested against, and the fallback where none fits. Simple beats fast here.

Layout shared by all kernels ("packed"): int32 [out, in * bits / 32], codes unsigned, low bits first. It is
byte for byte what compressed-tensors stores, and the transpose of what GPTQ stores.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, ceil(n * bits / 32)], low bits first, zero padded. bits: 4 or 8."""
    per_word = 32 // bits
    rows, n = codes.shape
    words = -(-n // per_word)
    padded = torch.zeros(rows, words * per_word, dtype=torch.int32, device=codes.device)
    padded[:, :n] = codes
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return (padded.view(rows, words, per_word) << shifts).sum(dim=-1, dtype=torch.int32)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """int32 [rows, words] -> uint8 codes [rows, n]; the inverse of `pack`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.view(packed.shape[0], -1)[:, :n].to(torch.uint8)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """(codes - zero) * scale in float32, rounded once to `dtype`.

    codes uint8 [out, in]; scale [out, groups]; zero uint8 [out, groups] or None (2**(bits-1)).
    """
    out, in_ = codes.shape
    groups = scale.shape[1]
    w = codes.view(out, groups, in_ // groups).float()
    w = w - (float(1 << (bits - 1)) if zero is None else zero.float().unsqueeze(-1))
    return (w * scale.float().unsqueeze(-1)).view(out, in_).to(dtype)


def quantize(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Nearest code (ties to even) on a given grid: uint8 [out, in]. w float [out, in], scale/zero [out, groups]."""
    out, in_ = w.shape
    groups = scale.shape[1]
    q = torch.round(w.view(out, groups, in_ // groups).float() / scale.float().unsqueeze(-1))
    q = q + (float(1 << (bits - 1)) if zero is None else zero.float().unsqueeze(-1))
    return q.clamp_(0, (1 << bits) - 1).to(torch.uint8).view(out, in_)


def matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in] @ dequantized(packed).T + bias, weights rounded to x.dtype first. Returns [..., out]."""
    codes = unpack(packed, bits, x.shape[-1])
    return torch.nn.functional.linear(x, dequantize(codes, scale, zero, bits, x.dtype), bias)
