"""bitsandbytes' roundings, code for code: NF4 and FP4 with an absolute maximum per block, and LLM.int8().

Reference: bitsandbytes, functional.py (create_dynamic_map) and backends/default/ops.py (quantize_4bit and the like).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..kernels.weight import TABLES, Nested, Weight
from ..spec import LayerSpec

if TYPE_CHECKING:
    import torch

_SLAB = 1 << 18  # weights at a time: bounds what is held beside the result
_LEAST = 1e-38  # absolute maxima below count as this


def table_codes(w: torch.Tensor, spec: LayerSpec) -> Weight:
    """w float [out, in], blocks of spec.group_size dividing `in`, on the table of spec.kind; scales in float32, or with
    `spec.scale.over` themselves quantized."""
    import torch

    from ..kernels import pack

    table = torch.tensor(TABLES[spec.kind])
    ordered, order = torch.sort(table, stable=True)
    bounds = (ordered[:-1] + ordered[1:]) / 2
    out, in_ = w.shape
    absmax = torch.empty(out, in_ // spec.group_size)
    packed = torch.empty(out, in_ // 8 + bool(in_ % 8), dtype=torch.int32)
    step = max(1, _SLAB // in_)
    for a in range(0, out, step):
        rows = w[a : a + step].float().view(-1, in_ // spec.group_size, spec.group_size)
        absmax[a : a + step] = rows.abs().amax(-1)
        inverse = 1.0 / absmax[a : a + step].clamp(min=_LEAST)
        scaled = (rows * inverse.unsqueeze(-1)).clamp_(-1, 1)
        codes = order[torch.bucketize(scaled, bounds)].to(torch.uint8)
        packed[a : a + step] = pack(codes.view(-1, in_), 4)
    if spec.scale.over is None:
        return Weight(packed, absmax, None, 4, in_, spec.kind)
    scale, nested = nest(absmax, spec.scale.over.block[1])
    return Weight(packed, scale, None, 4, in_, spec.kind, nested=nested)


def nest(absmax: torch.Tensor, block: int) -> tuple[torch.Tensor, Nested]:
    """Scales [out, groups] -> their codes, uint8, and what these stand for.

    The offset is their mean, computed in float64 so that it does not depend on the number of threads; bitsandbytes'
    own may be another float32 next to it."""
    import torch

    table = dynamic_map()
    offset = absmax.double().mean().float()
    flat = (absmax - offset).view(-1)
    blocks = -(-flat.numel() // block)
    padded = torch.zeros(blocks * block)
    padded[: flat.numel()] = flat
    outer = padded.view(blocks, block).abs().amax(-1)
    scaled = (padded.view(blocks, block) / outer.unsqueeze(-1)).nan_to_num_(0.0).view(-1)[: flat.numel()]
    # The nearest, and of two the lower.
    left = (torch.bucketize(scaled, table, right=True) - 1).clamp_(0, 254)
    nearer = (scaled - table[left + 1]).abs() < (scaled - table[left]).abs()
    codes = (left + nearer).to(torch.uint8).view(absmax.shape)
    return codes, Nested(table, outer, block, float(offset))


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic type, ascending (arXiv:1511.04561)."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def int8(w: torch.Tensor) -> Weight:
    """w float [out, in] by LLM.int8()'s rule: of float16 values, a scale per output.

    Raises QkitError for a weight that float16 cannot hold."""
    import torch

    from ..kernels import pack

    if w.numel() and float(w.abs().max()) > 65504:
        raise QkitError(f"a weight of {float(w.abs().max()):.3g} does not fit float16", "use another scheme")
    out, in_ = w.shape
    scale = torch.empty(out, 1)
    packed = torch.empty(out, -(-in_ // 4), dtype=torch.int32)
    step = max(1, _SLAB // in_)
    for a in range(0, out, step):
        half = w[a : a + step].half()
        absmax = half.abs().amax(1, keepdim=True).float()
        codes = torch.round(half * (127.0 / absmax)).nan_to_num_(0.0)
        packed[a : a + step] = pack((codes + 128).to(torch.uint8), 8)
        scale[a : a + step] = absmax / 127
    return Weight(packed, scale, None, 8, in_)
