"""Packing, unpacking, dequantizing and round-to-nearest quantizing, in C++ where it can be, else in torch.

Both give bit-identical tensors. The C++ library serves CPU tensors; `QKIT_REFERENCE=1` turns it off. "packed" is
int32 [rows, ceil(n * bits / 32)]: unsigned codes, low bits first, zero padded (the layout of `reference`).

Every function raises TypeError for a wrong dtype and ValueError for sizes that do not fit, with the values.
"""

from __future__ import annotations

import logging
import math
import zlib

import torch

from qkit.spec.dtypes import torch_dtype

from . import reference
from .cpu import lib
from .errors import NonFiniteError, ScaleOverflowError
from .weight import FLOATS, Weight, check_matrix

__all__ = [
    "NonFiniteError",
    "ScaleOverflowError",
    "backend",
    "crc32",
    "dequantize",
    "pack",
    "pack_transposed",
    "quantize_rtn",
    "unpack",
    "unpack_transposed",
]

_SCALE_DTYPES = ("F32", "F16", "BF16")
_log = logging.getLogger("qkit")
_warned = False


def backend() -> str:
    """What CPU tensors run on: "avx512", "avx2", "scalar", or "torch reference (why)"."""
    if reference.forced():
        return "torch reference (QKIT_REFERENCE=1)"
    loaded = lib.load()
    return f"torch reference ({loaded})" if isinstance(loaded, str) else lib.isas()[-1]


def _native(*tensors: torch.Tensor | None) -> bool:
    """Whether the C++ library takes these tensors; says once where it is missing."""
    global _warned
    if reference.forced() or any(t is not None and t.device.type != "cpu" for t in tensors):
        return False
    loaded = lib.load()
    if not isinstance(loaded, str):
        return True
    if not _warned:
        _warned = True
        _log.warning(
            "the CPU kernels are not available (%s): results are the same, conversion and CPU inference are slower. "
            "Reinstall qkit with a C++17 compiler to get them.",
            loaded,
        )
    return False


def crc32(t: torch.Tensor) -> int:
    """zlib's, of the tensor's bytes, row-major."""
    t = t.detach().cpu().contiguous()
    found = lib.crc32(t) if _native(t) else None
    return zlib.crc32(t.view(-1).view(torch.uint8).numpy().data) if found is None else found


def all_finite(t: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; makes no copy, as isfinite does."""
    if not t.numel():
        return True
    low, high = torch.aminmax(t)  # NaN wins both, infinity one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")


def _check_codes(codes: torch.Tensor, bits: int) -> None:
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError("a code does not fit its bits")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, ceil(n * bits / 32)]. Raises ValueError for a code above 2**bits - 1."""
    _check_bits(bits)
    check_matrix("codes", codes, (torch.uint8,))
    if _native(codes):
        return lib.pack(codes.contiguous(), bits)
    _check_codes(codes, bits)
    return reference.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """int32 [rows, ceil(n * bits / 32)] -> uint8 codes [rows, n]."""
    _check_bits(bits)
    check_matrix("packed", packed, (torch.int32,))
    _check_words(packed, bits, n)
    if _native(packed):
        return lib.unpack(packed.contiguous(), bits, n)
    return reference.unpack(packed, bits, n)


def _check_words(packed: torch.Tensor, bits: int, n: int) -> None:
    words = -(-n * bits // 32)
    if n < 0 or packed.shape[1] != words:
        raise ValueError(f"packed has shape {tuple(packed.shape)}, but {n} {bits}-bit codes a row take {words} words")


def pack_transposed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [n * bits / 32, rows] (GPTQ's qweight). n must fill whole words."""
    _check_bits(bits)
    check_matrix("codes", codes, (torch.uint8,))
    if codes.shape[1] * bits % 32:
        raise ValueError(f"{codes.shape[1]} {bits}-bit codes a row do not fill 32-bit words")
    if _native(codes):
        return lib.pack_transposed(codes.contiguous(), bits)
    _check_codes(codes, bits)
    return reference.pack(codes, bits).t().contiguous()


def unpack_transposed(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n * bits / 32, rows] -> uint8 codes [rows, n]; the inverse of `pack_transposed`."""
    _check_bits(bits)
    check_matrix("packed", packed, (torch.int32,))
    if _native(packed):
        return lib.unpack_transposed(packed.contiguous(), bits)
    return reference.unpack(packed.t().contiguous(), bits, packed.shape[0] * 32 // bits)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(code - zero) * scale in float32, rounded once to `dtype`: [out, in_features].

    packed int32 [out, words]; scale float [out, groups]; zero uint8 [out, groups] or None (2**(bits-1)).
    out: a contiguous tensor to fill; made where None.
    """
    Weight(packed, scale, zero, bits, in_features)  # checks that they fit together
    if dtype not in FLOATS:
        raise TypeError(f"cannot dequantize to {dtype}, only to " + ", ".join(str(d) for d in FLOATS))
    shape = (packed.shape[0], in_features)
    if out is not None and (tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, expected contiguous {dtype} {shape}")
    groups = scale.shape[1]
    # Several groups of an odd size would begin in the middle of a byte.
    if _native(packed, scale, zero, out) and (groups == 1 or in_features // groups % 2 == 0):
        target = torch.empty(shape, dtype=dtype) if out is None else out
        return lib.dequantize(packed.contiguous(), scale.contiguous(), _contiguous(zero), bits, target)
    result = reference.dequantize(reference.unpack(packed, bits, in_features), scale, zero, bits, dtype)
    return result if out is None else out.copy_(result)


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def quantize_rtn(
    w: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    min_zero: int = 0,
    multipliers: tuple[float, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, float]:
    """Round to nearest on the grid of `reference.grid`.

    w float [out, in]; group_size divides in, 0 for one group a row; scale_dtype "BF16", "F16" or "F32".
    multipliers: clip search; each group takes the one of the spanning scale and these multiples of it that leaves
    the least squared error. A negative one swaps the ends of a symmetric grid.
    Returns codes uint8 [out, in], scale [out, groups], zero uint8 [out, groups] (None: symmetric), the sum of
    squared errors and the sum of squares. The sums do not depend on the number of threads or the instruction set.
    Raises NonFiniteError (NaN or infinity in w) and ScaleOverflowError, both ValueErrors.
    """
    if bits not in (2, 3):
        _check_bits(bits)
    check_matrix("w", w, FLOATS)
    in_ = w.shape[1]
    if group_size < 0 or in_ < 1 or (group_size and in_ % group_size):
        raise ValueError(f"group size {group_size} does not divide {in_}")
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale dtype must be one of {', '.join(_SCALE_DTYPES)}, not {scale_dtype!r}")
    if min_zero not in (0, 1):
        raise ValueError(f"min_zero must be 0 or 1, not {min_zero}")
    if not all(math.isfinite(m) and m and (symmetric or m > 0) for m in multipliers):
        raise ValueError(f"multipliers must be finite, not 0, and above 0 where asymmetric: {multipliers}")
    groups = in_ // group_size if group_size else 1
    run = lib.quantize_rtn if _native(w) and bits in (4, 8) else reference.quantize_rtn
    return run(w.contiguous(), bits, groups, symmetric, torch_dtype(scale_dtype), min_zero, multipliers)
