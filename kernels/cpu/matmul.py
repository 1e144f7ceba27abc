"""The C++ matmul as an entry of `kernels.select`: weights are moved into its layout once, then multiplied."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import reference
from ..problem import Kernel, Problem
from ..weight import TABLES, Weight
from . import lib

_WIDE = 32  # outputs in a block of the layout (matmul_types.h)


@dataclass(frozen=True)
class CpuWeight:
    """A weight in the layout of kernels/cpu/matmul.h. `c` points into the tensors.

    codes int32 [ceil(out / 32) * 32 * ceil(in / 8) * bits / 4]; scale and zero [ceil(out / 32), groups, 32]
    scale_dtype  of the weight it was made from; kind, multiplier: its own
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    kind: str
    multiplier: float
    scale_dtype: torch.dtype
    int8: bool
    c: lib.QkWeight


def supports(p: Problem) -> str | None:
    """None, or why the C++ matmul does not take this problem."""
    if p.device.type != "cpu":
        return f"runs on the CPU, not on {p.device.type}"
    if reference.forced():
        return "QKIT_REFERENCE=1"
    if p.kind == "fp8" or p.activations == "fp8":
        return "has no fp8 arithmetic"
    if p.kind != "int" and p.activations is not None:
        return f"multiplies {p.kind} weights by unquantized activations only, not {p.activations}"
    if p.act_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16 activations, not {p.act_dtype}"
    if p.group_size != p.shape[1] and p.group_size % 8:
        return f"needs groups of a multiple of 8, not {p.group_size}"
    loaded = lib.load()
    return loaded if isinstance(loaded, str) else None


def _wide(t: torch.Tensor) -> torch.Tensor:
    """[out, groups] -> [ceil(out / 32), groups, 32], zero padded."""
    out, groups = t.shape
    padded = torch.zeros(-(-out // _WIDE) * _WIDE, groups, dtype=t.dtype)
    padded[:out] = t
    return padded.view(-1, _WIDE, groups).transpose(1, 2).contiguous()


def _narrow(t: torch.Tensor, out: int) -> torch.Tensor:
    return t.transpose(1, 2).reshape(-1, t.shape[1])[:out].contiguous()


@functools.cache
def _table(kind: str) -> torch.Tensor | None:
    return None if kind == "int" else torch.tensor(TABLES[kind], dtype=torch.float32)


def prepack(w: Weight, activations: str | None) -> CpuWeight:
    """The weight moved into the matmul's layout; nothing of `w` is kept."""
    plain = w.kind in ("int", "nf4", "fp4") and w.multiplier == 1.0
    scale = _wide(w.scale if plain else w.float_scale())
    zero = None if w.zero is None else _wide(w.zero)
    codes = lib.prepack(w.packed.contiguous(), w.in_features, w.bits)
    table = _table(w.kind)
    c = lib.QkWeight(
        codes.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(),
        None if table is None else table.data_ptr(), w.out_features, w.in_features, w.scale.shape[1], w.bits,
        lib.DTYPES[scale.dtype],
    )  # fmt: skip
    return CpuWeight(codes, scale, zero, w.kind, w.multiplier, w.scale.dtype, activations == "int8", c)


def restore(state: CpuWeight) -> Weight:
    """The weight that `prepack` was given, bit for bit."""
    c = state.c
    packed = lib.restore(state.codes, c.rows, c.cols, c.bits)
    scale = _narrow(state.scale, c.rows)
    if state.kind == "mxfp4":
        scale = torch.where(scale.isnan(), 255.0, torch.frexp(scale / state.multiplier).exponent + 126.0)
    elif state.multiplier != 1.0:
        scale = scale / state.multiplier
    zero = None if state.zero is None else _narrow(state.zero, c.rows)
    return Weight(packed, scale.to(state.scale_dtype), zero, c.bits, c.cols, state.kind, state.multiplier)


def matmul(x: torch.Tensor, state: CpuWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] @ weight.T + bias, in x's dtype. Raises ValueError for a wrong size, TypeError for a wrong dtype."""
    c = state.c
    if x.shape[-1] != c.cols:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes {c.cols} inputs")
    if x.dtype not in lib.DTYPES or x.device.type != "cpu":
        raise TypeError(f"x is {x.dtype} on {x.device}, expected float32, float16 or bfloat16 on the CPU")
    if bias is not None:
        if bias.shape != (c.rows,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(c.rows,)}")
        bias = bias.to(x.dtype).contiguous()
    if x.requires_grad and torch.is_grad_enabled():  # torch must see the product to differentiate it
        return reference.matmul(x, restore(state), bias, "int8" if state.int8 else None)
    y = lib.matmul(c, x.reshape(-1, c.cols).contiguous(), bias, state.int8)
    return y.view(*x.shape[:-1], c.rows)


KERNEL = Kernel("cpu", supports, prepack, matmul, restore)
