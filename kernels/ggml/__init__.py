"""ggml's block types: bytes <-> floats. Decoders in decode.py, encoders in C++ (cpu/ggml.h) and in reference.py with
layout.py; sizes in `qkit.spec.ggml`."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

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
from .layout import LAYOUTS, STORED, assemble

# Values per pass: the float32 scratch of one pass (4 MiB) stays in a core's share of the cache.
CHUNK = 1 << 20
_SLAB = 1 << 18  # values at a time: bounds what is held beside the result
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


def encode_with_error(
    w: torch.Tensor, name: str, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, float, float]:
    """Blocks of the type `name` (of `GRIDS`): uint8 [rows, bytes of a row]; and |w - decoded|^2, |w|^2.

    w           float [rows, in], on the CPU; blocks divide `in`
    importance  float [in], not negative: what a squared error in each input costs; None: the same for all
    Raises NonFiniteError for NaN or infinity in w, ScaleOverflowError where a scale does not fit float16, both
    ValueErrors, and ValueError for sizes that do not fit.
    """
    plain = GGML[name].plain if name in GGML else None
    if name not in GRIDS and plain not in ("F32", "F16", "BF16"):
        raise ValueError(f"blocks of type {name} are not written here, only {', '.join(GRIDS)}")
    check_matrix("w", w, FLOATS)
    GGML[name].row_bytes(w.shape[1])  # refuses what blocks do not divide
    weight = None if importance is None else _weights(importance, w.shape[1])
    if plain is not None:
        return _floats(w, torch_dtype(plain))
    try:
        out, lost, total = blocks(name, w, weight)
    except ScaleOverflowError:
        _check_range(w, _MOST)
        raise
    if not total < _MOST**2 / 2:  # NaN is not
        _check_range(w, _MOST)
    return out, lost, total


def _floats(w: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float, float]:
    _check_range(w, torch.finfo(dtype).max)
    kept = w.to(dtype).contiguous()
    lost = total = 0.0
    for x, y in _slabs(w, kept):
        x = x.double()
        lost, total = lost + float((x - y.double()).square_().sum()), total + float(x.square_().sum())
    return kept.view(torch.uint8), lost, total


def _slabs(*matrices: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some rows of each at a time."""
    step = max(1, _SLAB // max(1, matrices[0].shape[1]))
    return zip(*(m.split(step) for m in matrices), strict=True)


def _check_range(w: torch.Tensor, most: float) -> None:
    if w.numel():
        low, high = (float(v) for v in torch.aminmax(w))
        if not math.isfinite(low) or not math.isfinite(high):
            raise NonFiniteError("the weight contains NaN or infinity")
        if max(-low, high) > most:
            raise ScaleOverflowError("a scale overflows float16")


def _weights(importance: torch.Tensor, n: int) -> torch.Tensor:
    """Around 1, so that no sum of squares leaves float32; inputs that no calibration token reached cost a little."""
    if importance.shape != (n,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}, the weight {n} inputs")
    weight = importance.float().clamp(min=0)
    mean = weight.mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return torch.ones(n)
    return (weight / mean).clamp(1e-4, 1e6).contiguous()


def blocks(
    name: str, w: torch.Tensor, weight: torch.Tensor | None, isa: str | None = None
) -> tuple[torch.Tensor, float, float]:
    """The blocks, the sum of squared errors and the sum of squares: in C++ where the library is there, else in torch.

    Raises ScaleOverflowError where a scale does not fit float16, be it for a weight that is no number."""
    out = torch.empty(w.shape[0], GGML[name].row_bytes(w.shape[1]), dtype=torch.uint8)
    if _native(w):
        return out, *lib.ggml_encode(_c_grid(name, weight is not None)[0], w.contiguous(), weight, out, isa)
    lost = total = 0.0
    for rows, target in _slabs(w, out):
        fields = reference.fit(GRIDS[name], rows, weight)
        halves = [] if GRIDS[name].power else [part for part in (fields.d, fields.dmin) if part is not None]
        if not all(bool(torch.isfinite(part).all()) for part in halves):
            raise ScaleOverflowError("a scale overflows float16")
        target.copy_(assemble(name, fields))
        lost, total = lost + fields.lost, total + fields.total
    return out, lost, total


@functools.cache
def _c_grid(name: str, weighed: bool) -> tuple[lib.QkGrid, object]:
    """The grid for C, and the arrays that it points to."""
    g, targets = GRIDS[name], GRIDS[name].tried(weighed)
    least, most = g.scales or (0, 0)
    pieces = [lib.QkPiece(p.part, p.add, p.shift, p.bits, p.run) for p in LAYOUTS[name]]
    stored = STORED.get(name, ())
    contents: list[tuple[Any, Sequence[Any]]] = [
        (ctypes.c_float, g.levels), (ctypes.c_float, targets), (ctypes.c_uint8, stored), (lib.QkPiece, pieces),
    ]  # fmt: skip
    arrays = [(kind * len(values))(*values) for kind, values in contents]
    pointers = [ctypes.addressof(array) if len(array) else None for array in arrays]
    grid = lib.QkGrid(
        g.sub, g.low, g.high, g.affine, g.power, least, most, len(g.levels), len(targets), len(pieces), *pointers
    )
    return grid, arrays
