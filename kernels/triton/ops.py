"""The operators torch sees: opaque, with fake implementations, so torch.compile and CUDA graphs take them as they are.

    torch.ops.qkit.triton_linear(x, bias, *packed.parts())
    torch.ops.qkit.triton_dequantize(dtype, *packed.parts())

The launch configuration is looked up inside the operator, by the number of rows at run time. Nothing here waits for the
device, and nothing depends on the values of tensors.
"""

from __future__ import annotations

import os

import torch
import triton

from . import config as configs
from .config import Config, Key
from .dequantized import dequantize_kernel
from .device import card
from .gemm import gemm_kernel, reduce_kernel
from .layout import N_MULTIPLE, Packed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_PARTS = (
    "Tensor words, Tensor? scale, Tensor? zero, Tensor row, Tensor? table, "
    "str kind, int bits, int group_size, int out_features, int in_features"
)
_library = torch.library.Library("qkit", "FRAGMENT")
_library.define(f"triton_linear(Tensor x, Tensor? bias, {_PARTS}) -> Tensor")
_library.define(f"triton_dequantize(ScalarType dtype, {_PARTS}) -> Tensor")


def _linear(x, bias, *parts):  # type: ignore[no-untyped-def]
    p = Packed(*parts)
    rows = x.numel() // p.in_features
    if rows == 0:
        return x.new_empty(*x.shape[:-1], p.out_features)
    flat = x.reshape(rows, p.in_features)
    if flat.stride(1) != 1 or (rows > 1 and flat.stride(0) < p.in_features):
        flat = flat.contiguous()
    y = run(configs.choose(Key.of(p, x.dtype), rows, x.device), flat, p, bias)
    return y.view(*x.shape[:-1], p.out_features)


def run(c: Config, x: torch.Tensor, p: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, in] (rows apart by any stride) -> [rows, out] by the configuration given."""
    if c.route == "dequantize":
        return torch.nn.functional.linear(x, dequantize(p, x.dtype), bias)
    m, n, k, padded_n = x.shape[0], p.out_features, p.in_features, p.words.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    partial = torch.empty((c.split, m, padded_n), dtype=torch.float32, device=x.device) if c.split > 1 else p.row
    # Absent tensors are never read: `row` stands for them.
    scale, zero, table, bias_ = (p.row if t is None else t for t in (p.scale, p.zero, p.table, bias))
    with torch.cuda.device_of(x):
        gemm_kernel[(triton.cdiv(n, c.bn), triton.cdiv(m, c.bm), c.split)](
            x, p.words, scale, zero, p.row, table, bias_, y, partial, m, n, k, padded_n, x.stride(0),
            KIND=p.kind, BITS=p.bits, WORDS=p.words.shape[2], GROUP=p.group, ZERO=p.zero is not None,
            EVEN_K=k % p.block == 0, BIAS=bias is not None, ASM=_asm(x.device),
            SCALE_SUM=configs.scale_sums(p.kind, x.dtype, c.bm), SPLIT=c.split, BM=c.bm, BN=c.bn,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        if c.split > 1:
            reduce_kernel[(triton.cdiv(n, N_MULTIPLE), m)](
                partial, p.row, bias_, y, m, n, padded_n, SPLIT=c.split, BIAS=bias is not None, BN=N_MULTIPLE,
                num_warps=4,
            )  # fmt: skip
    return y


def dequantize(p: Packed, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in `dtype`."""
    y = torch.empty(p.out_features, p.in_features, dtype=dtype, device=p.device)
    blocks, padded_n, words = p.words.shape
    scale, zero, table = (p.row if t is None else t for t in (p.scale, p.zero, p.table))
    with torch.cuda.device_of(y):
        dequantize_kernel[(triton.cdiv(p.out_features, 64), blocks)](
            p.words, scale, zero, p.row, table, y, p.out_features, p.in_features, padded_n, KIND=p.kind, BITS=p.bits,
            WORDS=words, GROUP=p.group, ZERO=p.zero is not None, ASM=_asm(y.device), BN=64, num_warps=4,
        )  # fmt: skip
    return y


def _asm(device: torch.device) -> bool:
    """Whether kernels may be written in PTX."""
    return not INTERPRETED and not card(device).amd


def _linear_fake(x, bias, words, scale, zero, row, table, kind, bits, group_size, out_features, in_features):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


def _dequantize_fake(dtype, words, scale, zero, row, table, kind, bits, group_size, out_features, in_features):  # type: ignore[no-untyped-def]
    return words.new_empty(out_features, in_features, dtype=dtype)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, words, scale, zero, row, table, *ctx.about = inputs
    ctx.save_for_backward(words, scale, zero, row, table)
    ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    parts = (*ctx.saved_tensors, *ctx.about)
    by_bias = None
    if ctx.bias is not None and ctx.needs_input_grad[1]:
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias)
    return (grad @ torch.ops.qkit.triton_dequantize(ctx.dtype, *parts), by_bias) + (None,) * len(parts)


for _key in ("CUDA", "CPU"):  # CPU: only the interpreter gets there
    _library.impl("triton_linear", _linear, _key)
    _library.impl("triton_dequantize", lambda dtype, *parts: dequantize(Packed(*parts), dtype), _key)
torch.library.register_fake("qkit::triton_linear", _linear_fake)
torch.library.register_fake("qkit::triton_dequantize", _dequantize_fake)
torch.library.register_autograd("qkit::triton_linear", _backward, setup_context=_setup)
