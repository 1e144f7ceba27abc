"""Finds, loads and calls the CPU library. Tensors here are contiguous CPU tensors that the caller has validated."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

import torch

from ..errors import NonFiniteError, ScaleOverflowError

ABI = 9
# position = QkIsa; of those a machine has, a later one is faster
ISAS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx", "dotprod", "i8mm")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # QkDtype

_STATUS = {
    1: "bits is neither 4 nor 8",
    2: "the sizes do not fit together",
    3: "a required tensor is missing",
    4: "unsupported dtype",
    5: "this machine or build lacks the instruction set",
    9: "out of memory",
}


def _raise(status: int, function: str) -> None:
    if status == 6:
        raise NonFiniteError("the weight contains NaN or infinity")
    if status == 7:
        raise ScaleOverflowError("a scale overflows its stored type")
    if status == 8:
        raise ValueError("a code does not fit its bits")
    if status == 9:
        raise MemoryError(f"{function}: out of memory")
    raise ValueError(f"{function}: {_STATUS.get(status, f'status {status}')}")


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none. Looked for in this package's directories (an editable install has two)."""
    name = "libqkit_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
    package = sys.modules[__package__]
    found = [path for path in (Path(d, name) for d in package.__path__) if path.is_file()]
    if not found:
        return "the library was not built"
    try:
        lib = ctypes.CDLL(str(found[0]))
        version = lib.qk_abi()
    except (OSError, AttributeError) as error:
        return f"{found[0].name} does not load: {error}"
    if version != ABI:
        return f"{found[0].name} has interface {version}, not {ABI}: reinstall qkit"
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.qk_has_isa.argtypes = [i]
    for function in ("qk_pack", "qk_unpack", "qk_pack_transposed", "qk_unpack_transposed"):
        getattr(lib, function).argtypes = [p, p, n, n, i, i, i]
    lib.qk_dequantize.argtypes = [p, p, i, p, p, i, n, n, n, i, i, i]
    lib.qk_quantize_rtn.argtypes = [p, i, p, p, i, p, p, p, n, n, n, i, i, p, i, i, i]
    f = ctypes.c_float
    lib.qk_gptq_search.argtypes = [p, i, p, p, i, p, n, n, n, i, i, p, i, i, i]
    lib.qk_gptq_feedback.argtypes = [p, p, p, n, p, p, f, f, p, p, n, n, i, i]
    lib.qk_gptq_descend.argtypes = [p, p, n, p, p, f, p, p, n, n, i, i]
    lib.qk_ggml_encode.argtypes = [p, i, p, p, p, p, p, n, n, i, i]
    lib.qk_crc32.argtypes = [p, n, p]
    lib.qk_use_openmp.argtypes = [ctypes.c_char_p]
    lib.qk_prepacked_bytes.argtypes, lib.qk_prepacked_bytes.restype = [n, n, i], n
    lib.qk_prepack.argtypes = lib.qk_restore.argtypes = [p, p, n, n, i, i]
    lib.qk_matmul.argtypes = [p, p, i, p, p, n, i, i, i]
    if runtime := _openmp():
        lib.qk_use_openmp(runtime.encode())
    return lib


def _openmp() -> str | None:
    """The file of the OpenMP runtime that torch computes with, where that can be told."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    files = dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^\s]*)", mapped))
    # torch's wheels bring their own; another copy would be another pool of threads.
    own = [f for f in files if "torch" in f]
    return next(iter(own or files), None)


@functools.cache
def isas() -> tuple[str, ...]:
    """Instruction sets that this build and this machine share, slowest first; empty without a library."""
    lib = load()
    return () if isinstance(lib, str) else tuple(isa for k, isa in enumerate(ISAS) if lib.qk_has_isa(k))


@functools.cache
def _isa(name: str | None) -> int:
    name = name or isas()[-1]
    if name not in isas():
        raise ValueError(f"instruction set {name!r} is not available here, only {', '.join(isas())}")
    return ISAS.index(name)


@functools.cache
def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _most_threads() -> int:
    # An OpenMP runtime that binds its threads narrows the main thread to one core: its own count is then the right one.
    if any(name in os.environ for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")):
        return sys.maxsize
    return _cpus()


def _threads() -> int:
    return min(_most_threads(), torch.get_num_threads())


def _ptr(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def library() -> ctypes.CDLL:
    lib = load()
    if isinstance(lib, str):
        raise RuntimeError(f"no CPU library: {lib}")
    return lib


def _call(function: str, *args: object) -> None:
    if status := getattr(library(), function)(*args):
        _raise(status, function)


def crc32(t: torch.Tensor) -> int | None:
    """zlib's, of the bytes of a contiguous tensor; None where zlib is as fast."""
    found = ctypes.c_uint32()
    status = library().qk_crc32(_ptr(t), t.nbytes, ctypes.addressof(found))
    if status not in (0, 5):
        _raise(status, "qk_crc32")
    return None if status else found.value


def pack(codes: torch.Tensor, bits: int, isa: str | None = None) -> torch.Tensor:
    rows, n = codes.shape
    packed = torch.empty(rows, -(-n * bits // 32), dtype=torch.int32)
    _call("qk_pack", _ptr(codes), _ptr(packed), rows, n, bits, _isa(isa), _threads())
    return packed


def unpack(packed: torch.Tensor, bits: int, n: int, isa: str | None = None) -> torch.Tensor:
    codes = torch.empty(packed.shape[0], n, dtype=torch.uint8)
    _call("qk_unpack", _ptr(packed), _ptr(codes), packed.shape[0], n, bits, _isa(isa), _threads())
    return codes


def pack_transposed(codes: torch.Tensor, bits: int, isa: str | None = None) -> torch.Tensor:
    rows, n = codes.shape
    packed = torch.empty(n * bits // 32, rows, dtype=torch.int32)
    _call("qk_pack_transposed", _ptr(codes), _ptr(packed), rows, n, bits, _isa(isa), _threads())
    return packed


def unpack_transposed(packed: torch.Tensor, bits: int, isa: str | None = None) -> torch.Tensor:
    words, rows = packed.shape
    codes = torch.empty(rows, words * 32 // bits, dtype=torch.uint8)
    _call("qk_unpack_transposed", _ptr(packed), _ptr(codes), rows, codes.shape[1], bits, _isa(isa), _threads())
    return codes


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    out: torch.Tensor,
    isa: str | None = None,
) -> torch.Tensor:
    """Fills `out` [rows, cols], of the dtype wanted."""
    rows, cols = out.shape
    _call(
        "qk_dequantize", _ptr(packed), _ptr(scale), DTYPES[scale.dtype], _ptr(zero), _ptr(out), DTYPES[out.dtype],
        rows, cols, scale.shape[1], bits, _isa(isa), _threads(),
    )  # fmt: skip
    return out


def quantize_rtn(
    w: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    min_zero: int,
    multipliers: tuple[float, ...] = (),
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, float]:
    rows, cols = w.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale = torch.empty(rows, groups, dtype=scale_dtype)
    zero = None if symmetric else torch.empty(rows, groups, dtype=torch.uint8)
    row_stats = torch.empty(rows, 2, dtype=torch.float64)
    totals = (ctypes.c_double * 2)()
    candidates = (ctypes.c_float * len(multipliers))(*multipliers)
    _call(
        "qk_quantize_rtn", _ptr(w), DTYPES[w.dtype], _ptr(codes), _ptr(scale), DTYPES[scale_dtype], _ptr(zero),
        _ptr(row_stats), ctypes.addressof(totals), rows, cols, groups, bits, min_zero, ctypes.addressof(candidates),
        len(multipliers), _isa(isa), _threads(),
    )  # fmt: skip
    return codes, scale, zero, totals[0], totals[1]


class QkWeight(ctypes.Structure):
    """`QkWeight` of qkit_cpu.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("groups", ctypes.c_int64),
        ("bits", ctypes.c_int), ("scale_dtype", ctypes.c_int),
    )  # fmt: skip


def prepack(packed: torch.Tensor, cols: int, bits: int) -> torch.Tensor:
    """int32 [out, words] -> the matmul's layout, int32 [n]."""
    size = library().qk_prepacked_bytes(packed.shape[0], cols, bits)
    codes = torch.empty(size // 4, dtype=torch.int32)
    _call("qk_prepack", _ptr(packed), _ptr(codes), packed.shape[0], cols, bits, _threads())
    return codes


def restore(codes: torch.Tensor, rows: int, cols: int, bits: int) -> torch.Tensor:
    """The inverse of `prepack`."""
    packed = torch.empty(rows, -(-cols * bits // 32), dtype=torch.int32)
    _call("qk_restore", _ptr(codes), _ptr(packed), rows, cols, bits, _threads())
    return packed


def matmul(
    weight: QkWeight, x: torch.Tensor, bias: torch.Tensor | None, int8: bool = False, isa: str | None = None
) -> torch.Tensor:
    """x [m, in] @ weight.T + bias [out], all of x's dtype; returns [m, out]."""
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype)
    status = library().qk_matmul(
        ctypes.addressof(weight), x.data_ptr(), DTYPES[x.dtype], None if bias is None else bias.data_ptr(),
        out.data_ptr(), x.shape[0], int8, _isa(isa), _threads(),
    )  # fmt: skip
    if status:
        _raise(status, "qk_matmul")
    return out


def gptq_search(
    w: torch.Tensor,
    cost: torch.Tensor,
    bits: int,
    groups: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    min_zero: int,
    multipliers: tuple[float, ...],
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, cols = w.shape
    scale = torch.empty(rows, groups, dtype=scale_dtype)
    zero = None if symmetric else torch.empty(rows, groups, dtype=torch.uint8)
    values = (ctypes.c_float * len(multipliers))(*multipliers)
    _call(
        "qk_gptq_search", _ptr(w), DTYPES[w.dtype], _ptr(cost), _ptr(scale), DTYPES[scale_dtype], _ptr(zero),
        rows, cols, groups, bits, min_zero, ctypes.addressof(values), len(multipliers), _isa(isa), _threads(),
    )  # fmt: skip
    return scale, zero


class QkPiece(ctypes.Structure):
    """`QkPiece` of qkit_cpu.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("part", "add", "shift", "bits", "run"))


class QkGrid(ctypes.Structure):
    """A block type of ggml, as qkit_cpu.h has it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("sub", "low", "high", "affine", "power", "least", "most")),
        *((name, ctypes.c_int32) for name in ("n_levels", "n_targets", "n_pieces")),
        *((name, ctypes.c_void_p) for name in ("levels", "targets", "stored", "pieces")),
    )


def ggml_encode(
    grid: QkGrid, w: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor, isa: str | None = None
) -> tuple[float, float]:
    """Fills out, uint8 [rows, bytes of a row]. Returns the sum of squared errors and the sum of squares."""
    stats, totals = torch.empty(3 * -(-w.shape[0] // 16), dtype=torch.float64), (ctypes.c_double * 2)()
    _call(
        "qk_ggml_encode", _ptr(w), DTYPES[w.dtype], _ptr(weight), ctypes.addressof(grid), _ptr(out), _ptr(stats),
        ctypes.addressof(totals), *w.shape, _isa(isa), _threads(),
    )  # fmt: skip
    return totals[0], totals[1]


def _square(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A [n, n] view whose rows are contiguous, and its row stride."""
    if t.shape[1] > 1 and t.stride(1) != 1:
        t = t.contiguous()
    return t, max(t.stride(0), t.shape[1])


def gptq_feedback(
    target: torch.Tensor,
    weight: torch.Tensor,
    l: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    mid: float,
    top: float,
    codes: torch.Tensor,
    errors: torch.Tensor,
    isa: str | None = None,
) -> None:
    target, weight, scale = target.contiguous(), weight.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    l, stride = _square(l)
    _call(
        "qk_gptq_feedback", _ptr(target), _ptr(weight), _ptr(l), stride, _ptr(scale), _ptr(zero), mid, top,
        _ptr(codes), _ptr(errors), *weight.shape, _isa(isa), _threads(),
    )  # fmt: skip


def gptq_descend(
    gradient: torch.Tensor,
    h: torch.Tensor,
    diagonal: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    top: float,
    isa: str | None = None,
) -> torch.Tensor:
    gradient, scale = gradient.contiguous(), scale.contiguous()
    h, stride = _square(h)
    steps = torch.empty_like(codes)
    _call(
        "qk_gptq_descend", _ptr(gradient), _ptr(h), stride, _ptr(diagonal), _ptr(scale), top, _ptr(codes), _ptr(steps),
        *codes.shape, _isa(isa), _threads(),
    )  # fmt: skip
    return steps
