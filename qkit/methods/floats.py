"""Rounding to small floats and to narrow integers: FP8, NVFP4, MXFP4, and the int8 weights of W8A8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.weight import TABLES, Weight
from ..spec import LayerSpec
from ..spec.dtypes import E4M3_MAX, torch_dtype

if TYPE_CHECKING:
    import torch

_SLAB = 1 << 18  # weights at a time: bounds what is held beside the result
_FP4_MAX = 6.0
# NVFP4: engines load fused layers with one global scale. A power of two changes no rounding, and as long as weights are
# not above 2.6 all layers have the same.
_MOST_GLOBAL = 1024.0


def fp8(w: torch.Tensor, spec: LayerSpec) -> Weight:
    """w float [out, in] as e4m3 with a scale per block of spec.scale: the largest weight is the largest number."""
    import torch

    from ..kernels import pack

    out, in_ = w.shape
    rows, columns = spec.scale.block[0] or out, spec.scale.block[1] or in_
    dtype = torch_dtype(spec.scale_dtype)
    scales = torch.empty(-(-out // rows), in_ // columns, dtype=dtype)
    packed = torch.empty(out, -(-in_ // 4), dtype=torch.int32)
    step = max(1, _SLAB // in_ // rows) * rows
    for a in range(0, out, step):
        here = min(step, out - a)
        part = torch.zeros(-(-here // rows) * rows, in_)
        part[:here] = w[a : a + step]
        blocks = part.view(-1, rows, in_ // columns, columns)
        scale = (torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3))) / E4M3_MAX).to(dtype)
        scale = torch.where(scale.float() > 0, scale, torch.ones((), dtype=dtype))
        scales[a // rows : a // rows + len(scale)] = scale
        blocks.div_(scale.float()[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
        codes = part[:here].to(torch.float8_e4m3fn).view(torch.uint8)
        packed[a : a + step] = pack(codes, 8)
    return Weight(packed, scales, None, 8, in_, "fp8", scale_rows=rows)


def nvfp4(w: torch.Tensor) -> Weight:
    """w float [out, in], 16 dividing `in`: e2m1 codes, e4m3 scales per 16, and a power of two over all.

    Of the scale that spans a group and its two neighbours in e4m3 the one of least error."""
    import torch

    from ..kernels import pack

    out, in_ = w.shape
    largest = float(w.abs().max()) if w.numel() else 0.0
    above = 1.0
    while largest > 0 and above < _MOST_GLOBAL and 2 * above * largest <= E4M3_MAX * _FP4_MAX:
        above *= 2
    while above * largest > E4M3_MAX * _FP4_MAX:
        above /= 2
    scales = torch.empty(out, in_ // 16, dtype=torch.float8_e4m3fn)
    packed = torch.empty(out, -(-in_ // 8), dtype=torch.int32)
    step = max(1, _SLAB // in_)
    for a in range(0, out, step):
        x = w[a : a + step].float().view(-1, in_ // 16, 16)
        span = (x.abs().amax(-1) / _FP4_MAX * above).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        bits = span.view(torch.uint8).int()
        best = None
        for move in (0, -1, 1):
            scale = (bits + move).clamp(0, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn)
            codes = e2m1(x, scale.float() / above)
            lost = (x - _values(codes) * (scale.float() / above).unsqueeze(-1)).square().sum(-1)
            if best is None:
                best, chosen, kept = lost, scale.view(torch.uint8), codes
            else:
                better = lost < best
                best = torch.where(better, lost, best)
                chosen = torch.where(better, scale.view(torch.uint8), chosen)
                kept = torch.where(better.unsqueeze(-1), codes, kept)
        scales[a : a + step] = chosen.view(torch.float8_e4m3fn)
        packed[a : a + step] = pack(kept.view(-1, in_), 4)
    return Weight(packed, scales, None, 4, in_, "nvfp4", 1.0 / above)


def mxfp4(w: torch.Tensor) -> Weight:
    """w float [out, in], 32 dividing `in`: e2m1 codes and a power of two per 32, that of least error."""
    import torch

    from ..kernels import pack
    from ..kernels.ggml import blocks
    from ..kernels.ggml.decode import nibbles

    out, in_ = w.shape
    scales = torch.empty(out, in_ // 32, dtype=torch.uint8)
    packed = torch.empty(out, -(-in_ // 8), dtype=torch.int32)
    step = max(16, _SLAB // in_ // 16 * 16)
    for a in range(0, out, step):
        made = blocks("MXFP4", w[a : a + step], None)[0].view(-1, in_ // 32, 17)  # the power of two, then codes
        packed[a : a + step] = pack(nibbles(made[..., 1:].reshape(-1, 16), 16).view(-1, in_), 4)
        scales[a : a + step] = made[..., 0]
    return Weight(packed, scales, None, 4, in_, "mxfp4")


def e2m1(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest codes uint8 of x [..., groups, size] on scales [..., groups]; zero where a scale is."""
    import torch

    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    scaled = x * inverse.unsqueeze(-1)
    return (torch.bucketize(scaled.abs(), bounds) + 8 * (scaled < 0)).to(torch.uint8)


def _values(codes: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(TABLES["nvfp4"])[codes.int()]


def narrow_int8(w: torch.Tensor, spec: LayerSpec) -> Weight:
    """w float [out, in] as -127 .. 127 with a positive scale per output, as engines' int8 products want them."""
    import torch

    from ..kernels import pack

    out, in_ = w.shape
    scale = torch.empty(out, 1, dtype=torch_dtype(spec.scale_dtype))
    packed = torch.empty(out, -(-in_ // 4), dtype=torch.int32)
    step = max(1, _SLAB // in_)
    for a in range(0, out, step):
        part = w[a : a + step].float()
        s = (part.abs().amax(1, keepdim=True) / 127).to(scale.dtype)
        s = torch.where(s.float() > 0, s, torch.ones((), dtype=s.dtype))
        scale[a : a + step] = s
        packed[a : a + step] = pack(((part / s.float()).round_().clamp_(-127, 127) + 128).to(torch.uint8), 8)
    return Weight(packed, scale, None, 8, in_)
