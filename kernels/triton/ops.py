"""The operators torch sees: opaque, with fake implementations, so torch.compile and CUDA graphs take them as they are.

    torch.ops.qkit.triton_linear(x, words, scale, zero, row, table, bias, kind, bits, group_size, out, in, paired)
    torch.ops.qkit.triton_dequantize(words, scale, zero, row, table, kind, bits, group_size, out, in, dtype)

The launch configuration is looked up inside the operator, by the number of rows at run time. Nothing here waits for the
device, and nothing depends on the values of tensors.
"""

from __future__ import annotations

import os

import torch
import triton

from . import config as configs
from .config import Config
from .expand import dequantize_kernel
from .gemm import gemm_kernel, reduce_kernel
from .gemv import gemv_kernel
from .layout import N_MULTIPLE

DTYPES = (torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ASM = torch.version.hip is None and not INTERPRETED

_library = torch.library.Library("qkit", "FRAGMENT")
_library.define(
    "triton_linear(Tensor x, Tensor words, Tensor? scale, Tensor? zero, Tensor row, Tensor? table, Tensor? bias, "
    "str kind, int bits, int group_size, int out_features, int in_features, bool paired) -> Tensor"
)
_library.define(
    "triton_dequantize(Tensor words, Tensor? scale, Tensor? zero, Tensor row, Tensor? table, str kind, int bits, "
    "int group_size, int out_features, int in_features, ScalarType dtype) -> Tensor"
)


def _linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    paired: bool,
) -> torch.Tensor:
    rows = x.numel() // in_features if in_features else 0
    width = out_features // 2 if paired else out_features
    if rows == 0:
        return x.new_empty(*x.shape[:-1], width)
    flat = x.reshape(rows, in_features)
    if flat.stride(1) != 1 or (rows > 1 and flat.stride(0) < in_features):
        flat = flat.contiguous()
    problem = configs.Key(
        kind, bits, group_size if scale is not None else 0, zero is not None, x.dtype, words.shape[1], in_features
    )
    chosen = configs.choose(problem, rows, x.device)
    y = run(
        chosen, flat, words, scale, zero, row, table, bias, kind, bits, group_size, out_features, in_features, paired
    )
    return y.view(*x.shape[:-1], width)


def run(
    c: Config,
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    paired: bool,
) -> torch.Tensor:
    """x [rows, in] (rows apart by any stride) -> [rows, out or out / 2] by the configuration given."""
    m, n, k, padded_n = x.shape[0], out_features, in_features, words.shape[1]
    if c.route == "dequantize":
        w = _dequantize(words, scale, zero, row, table, kind, bits, group_size, n, k, x.dtype)
        y = torch.nn.functional.linear(x, w, bias)
        return torch.nn.functional.silu(y[:, 0::2]) * y[:, 1::2] if paired else y
    group = 0 if scale is None else group_size
    even_k = k % (words.shape[2] * 32 // bits) == 0
    y = torch.empty(m, n // 2 if paired else n, dtype=x.dtype, device=x.device)
    partial = torch.empty((c.split, m, padded_n), dtype=torch.float32, device=x.device) if c.split > 1 else row
    shared = {"BIAS": bias is not None, "PAIRED": paired}
    # Absent tensors are never read: `row` stands for them.
    scale_, zero_, table_, bias_ = (row if t is None else t for t in (scale, zero, table, bias))
    layout = {
        "BITS": bits,
        "WORDS": words.shape[2],
        "GROUP": group,
        "ZERO": zero is not None,
        "EVEN_K": even_k,
        "ASM": ASM,
    }
    tiles = triton.cdiv(n, c.bn)
    with torch.cuda.device_of(x):
        if c.route == "gemv":
            gemv_kernel[(tiles, 1, c.split)](
                x, words, scale_, zero_, row, bias_, y, partial, m, n, k, padded_n,
                **layout, **shared, SPLIT=c.split, BN=c.bn, num_warps=c.warps, num_stages=c.stages,
            )  # fmt: skip
        else:
            gemm_kernel[(tiles, triton.cdiv(m, c.bm), c.split)](
                x, words, scale_, zero_, row, table_, bias_, y, partial, m, n, k, padded_n, x.stride(0),
                KIND=kind, **layout, **shared, SCALE_SUM=configs.scale_sums(kind, x.dtype, c.bm), SPLIT=c.split,
                BM=c.bm, BN=c.bn, num_warps=c.warps, num_stages=c.stages,
            )  # fmt: skip
        if c.split > 1:
            reduce_kernel[(triton.cdiv(n, N_MULTIPLE), m)](
                partial, row, bias_, y, m, n, padded_n, SPLIT=c.split, **shared, BN=N_MULTIPLE, num_warps=4
            )
    return y


def _dequantize(
    words: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    table: torch.Tensor | None,
    kind: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.empty(out_features, in_features, dtype=dtype, device=words.device)
    blocks, padded_n, width = words.shape
    scale_, zero_, table_ = (row if t is None else t for t in (scale, zero, table))
    with torch.cuda.device_of(words):
        dequantize_kernel[(triton.cdiv(out_features, 64), blocks)](
            words, scale_, zero_, row, table_, y, out_features, in_features, padded_n, KIND=kind, BITS=bits,
            WORDS=width, GROUP=0 if scale is None else group_size, ZERO=zero is not None, ASM=ASM, BN=64, num_warps=4,
        )  # fmt: skip
    return y


def _linear_fake(x, words, scale, zero, row, table, bias, kind, bits, group_size, out_features, in_features, paired):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features // 2 if paired else out_features)


def _dequantize_fake(words, scale, zero, row, table, kind, bits, group_size, out_features, in_features, dtype):  # type: ignore[no-untyped-def]
    return words.new_empty(out_features, in_features, dtype=dtype)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, words, scale, zero, row, table, bias, *rest = inputs
    if rest[-1]:
        raise ValueError("the product with a SiLU-mul epilogue has no gradient")
    ctx.save_for_backward(words, scale, zero, row, table)
    ctx.rest, ctx.dtype, ctx.bias = rest[:-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    words, scale, zero, row, table = ctx.saved_tensors
    kind, bits, group_size, out_features, in_features = ctx.rest
    w = torch.ops.qkit.triton_dequantize(
        words, scale, zero, row, table, kind, bits, group_size, out_features, in_features, ctx.dtype
    )
    by_bias = None
    if ctx.bias is not None and ctx.needs_input_grad[6]:
        by_bias = grad.reshape(-1, out_features).sum(0).to(ctx.bias)
    return (grad @ w, None, None, None, None, None, by_bias) + (None,) * 6


for _key in ("CUDA", "CPU"):  # CPU: only the interpreter gets there
    _library.impl("triton_linear", _linear, _key)
    _library.impl("triton_dequantize", _dequantize, _key)
torch.library.register_fake("qkit::triton_linear", _linear_fake)
torch.library.register_fake("qkit::triton_dequantize", _dequantize_fake)
torch.library.register_autograd("qkit::triton_linear", _backward, setup_context=_setup)
