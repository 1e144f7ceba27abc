"""ggml's block types: bytes <-> floats. Decoders in decode.py, encoders in C++ (cpu/ggml.h) and reference.py; sizes in
`qkit.spec.ggml`."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from qkit.spec.dtypes import torch_dtype
from qkit.spec.ggml import GGML, GGML_TYPES, GgmlType

from .. import _native
from ..cpu import lib
from ..errors import NonFiniteError, ScaleOverflowError
from ..weight import FLOATS, check_matrix
from . import reference
from .decode import DECODERS
from .grids import GRIDS
from .layout import assemble
from .reference import Fields

# Values per pass: the float32 scratch of one pass (4 MiB) stays in a core's share of the cache.
CHUNK = 1 << 20
_LANES = 16  # rows that the C++ takes at a time
_SLAB = 1 << 22  # values at a time: bounds what is held beside the result
_MOST = 1e9  # larger weights overflow the scales of every type


def readable(ggml_type: GgmlType) -> bool:
    """Whether `dequantize` knows it."""
    return ggml_type.plain in ("F32", "F16", "BF16", "F64") or ggml_type.name in DECODERS


def readable_types() -> list[str]:
    """Names of the types that `dequantize` handles, in the order of their numbers."""
    return [t.name for t in GGML_TYPES.values() if readable(t)]


def dequantize(raw: torch.Tensor, ggml_type: GgmlType, out: torch.Tensor) -> None:
    """Decode whole blocks: raw uint8 [bytes] into out float [values], contiguous; rounded once to out.dtype.

    Memory: a few scratch buffers of CHUNK values, whatever the size.
    """
    if ggml_type.plain is not None:
        out.copy_(raw.view(torch_dtype(ggml_type.plain)))
        return
    decode = DECODERS[ggml_type.name]
    blocks = raw.view(-1, ggml_type.block_bytes)
    target = out.view(-1, ggml_type.block_size)
    step = CHUNK // ggml_type.block_size
    direct = out.dtype == torch.float32
    scratch = None if direct else torch.empty(min(step, len(blocks)), ggml_type.block_size)
    for start in range(0, len(blocks), step):
        part = target[start : start + step]
        values = part if scratch is None else scratch[: len(part)]
        decode(blocks[start : start + step], values)
        if not direct:
            part.copy_(values)


def encode(w: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """`encode_with_error` without the error."""
    return encode_with_error(w, name, importance)[0]


def encode_with_error(w: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Blocks of the type `name` (of `GRIDS`): uint8 [rows, bytes of a row]; and |w - decoded| / |w|, Frobenius.

    w           float [rows, in], on the CPU; blocks divide `in`
    importance  float [in], not negative: what a squared error in each input costs; None: the same for all
    Raises NonFiniteError for NaN or infinity in w, ScaleOverflowError where a scale does not fit float16, both
    ValueErrors, and ValueError for sizes that do not fit.
    """
    plain = GGML[name].plain if name in GGML else None
    if name not in GRIDS and plain not in ("F32", "F16", "BF16"):
        raise ValueError(f"blocks of type {name} are not written here, only {', '.join(GRIDS)}")
    check_matrix("w", w, FLOATS)
    nbytes = GGML[name].row_bytes(w.shape[1])
    weight = None if importance is None else _weights(importance, w.shape[1])
    if w.numel():
        low, high = (float(v) for v in torch.aminmax(w))
        if not math.isfinite(low) or not math.isfinite(high):
            raise NonFiniteError("the weight contains NaN or infinity")
        if max(-low, high) > (_MOST if plain is None else torch.finfo(torch_dtype(plain)).max):
            raise ScaleOverflowError("a scale overflows float16")
    step = max(_LANES, _SLAB // max(1, w.shape[1]) // _LANES * _LANES)
    if plain is not None:
        kept = w.to(torch_dtype(plain)).contiguous()
        lost = total = 0.0
        for a in range(0, w.shape[0], step):
            x, y = w[a : a + step].double(), kept[a : a + step].double()
            lost, total = lost + float((x - y).square_().sum()), total + float(x.square_().sum())
        return kept.view(torch.uint8), math.sqrt(lost / total) if total else 0.0
    out = torch.empty(w.shape[0], nbytes, dtype=torch.uint8)
    lost = total = 0.0
    for a in range(0, w.shape[0], step):
        fields = fit(name, w[a : a + step], weight)
        lost, total = lost + fields.lost, total + fields.total
        if not GRIDS[name].power:
            parts = [fields.d] if fields.dmin is None else [fields.d, fields.dmin]
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise ScaleOverflowError("a scale overflows float16")
        out[a : a + step] = assemble(name, fields)
    return out, math.sqrt(lost / total) if total else 0.0


def _weights(importance: torch.Tensor, n: int) -> torch.Tensor:
    """Around 1, so that no sum of squares leaves float32; inputs that no calibration token reached cost a little."""
    if importance.shape != (n,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}, the weight {n} inputs")
    weight = importance.float().clamp(min=0)
    mean = weight.mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return torch.ones(n)
    return (weight / mean).clamp(1e-4, 1e6).contiguous()


def fit(name: str, w: torch.Tensor, weight: torch.Tensor | None, isa: str | None = None) -> Fields:
    """What the blocks hold: in C++ where the library is there, else in torch."""
    grid = GRIDS[name]
    if not _native(w):
        return reference.fit(grid, w, weight)
    rows, n = w.shape
    blocks, subs = n // (grid.sub * grid.per_scale), n // grid.sub
    codes = torch.empty(rows, n, dtype=torch.uint8)
    d = torch.empty(rows, blocks, dtype=torch.int16 if grid.power else torch.float16)
    dmin = torch.empty(rows, blocks, dtype=torch.float16) if grid.affine else None
    scales = torch.empty(rows, subs, dtype=torch.int16) if grid.scales else None
    minima = torch.empty(rows, subs, dtype=torch.int16) if grid.scales and grid.affine else None
    sums = lib.ggml_fit(_c_grid(name)[0], w.contiguous(), weight, codes, d, dmin, scales, minima, isa)
    return Fields(codes, d, dmin, scales, minima, *sums)


@functools.cache
def _c_grid(name: str) -> tuple[lib.QkGrid, object, object]:
    """The grid for C, and the arrays that it points to."""
    g = GRIDS[name]
    levels = (ctypes.c_float * len(g.levels))(*g.levels)
    targets = (ctypes.c_float * len(g.targets))(*g.targets)
    least, most = g.scales or (0, 0)
    grid = lib.QkGrid(
        g.sub, g.low, g.high, g.affine, g.power, least, most, len(g.levels), len(g.targets),
        ctypes.addressof(levels), ctypes.addressof(targets),
    )  # fmt: skip
    return grid, levels, targets
