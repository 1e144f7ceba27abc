"""Who multiplies: torch, our kernels, and the other packages that are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .checks import make


@dataclass(frozen=True)
class Contender:
    """One way to compute x [m, in] @ W.T; `bytes` is what it must read of the weight, `dtype` what it takes."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    bytes: int
    dtype: torch.dtype = torch.bfloat16


def contenders(shape: tuple[int, int], device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be had for a weight [out, in], torch first, and for the others why not."""
    found, missing = [], {}
    for name, build in _BUILDERS.items():
        try:
            found.append(build(shape, device))
        except Exception as error:  # a package that is absent, or too old or new, must not end the run
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return found, missing


def _torch(shape: tuple[int, int], device: str) -> Contender:
    w = torch.randn(shape, device=device).bfloat16() * 0.02
    return Contender("torch bfloat16", lambda x: torch.nn.functional.linear(x, w), w.nbytes)


def _ours(name: str, kind: str, group: int) -> Callable[[tuple[int, int], str], Contender]:
    def build(shape: tuple[int, int], device: str) -> Contender:
        from qkit.kernels import triton

        state = triton.layer(make(kind, 4, group, False, shape, device))
        size = sum(t.nbytes for t in state.packed.parts() if isinstance(t, torch.Tensor))
        return Contender(name, lambda x: triton.linear(x, state.packed), size)

    return build


def _ours_8(kind: str, activations: str) -> Callable[[tuple[int, int], str], Contender]:
    def build(shape: tuple[int, int], device: str) -> Contender:
        from qkit.kernels.triton import w8a8

        packed = w8a8.prepack(make(kind, 8, 0, False, shape, device), activations)
        return Contender(f"qkit w8a8 {activations}", lambda x: w8a8.matmul(x, packed), packed.codes.nbytes)

    return build


def _marlin(shape: tuple[int, int], device: str) -> Contender:
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    out, in_ = shape
    w = torch.randn(in_, out, device=device, dtype=torch.bfloat16) * 0.02
    _, words, scales, *_ = marlin_utils_test.marlin_quantize(w, scalar_types.uint4b8, 128)
    workspace = marlin_utils.marlin_make_workspace_new(torch.device(device))
    empty = torch.empty(0, dtype=torch.int, device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        return marlin_utils.apply_gptq_marlin_linear(x, words, scales, empty, workspace, scalar_types.uint4b8, out, in_)

    run(torch.zeros(1, in_, device=device, dtype=torch.bfloat16))
    return Contender("marlin (vllm) w4a16 g128", run, words.nbytes + scales.nbytes)


def _bitsandbytes(shape: tuple[int, int], device: str) -> Contender:
    import bitsandbytes as bnb

    w = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    words, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")

    def run(x: torch.Tensor) -> torch.Tensor:
        return bnb.matmul_4bit(x, words.t(), state)

    run(torch.zeros(1, shape[1], device=device, dtype=torch.bfloat16))
    return Contender("bitsandbytes nf4 g64", run, words.nbytes + state.absmax.nbytes)


def _gemlite(shape: tuple[int, int], device: str) -> Contender:
    from gemlite.helper import A16Wn

    out, in_ = shape
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    scales = torch.full((out * in_ // 128, 1), 0.01, dtype=torch.float16, device=device)
    layer = A16Wn(device=device).from_weights(codes, scales, torch.full_like(scales, 8), 4, 128)
    layer(torch.zeros(1, in_, device=device, dtype=torch.float16))
    return Contender("gemlite w4a16 g128", layer, out * in_ // 2 + scales.nbytes, torch.float16)


_BUILDERS: dict[str, Callable[[tuple[int, int], str], Contender]] = {
    "torch bfloat16": _torch,
    "qkit w4a16": _ours("qkit w4a16 g128", "int", 128),
    "qkit nf4": _ours("qkit nf4 g64", "nf4", 64),
    "qkit w8a8 int8": _ours_8("int", "int8"),
    "qkit w8a8 fp8": _ours_8("fp8", "fp8"),
    "marlin": _marlin,
    "bitsandbytes": _bitsandbytes,
    "gemlite": _gemlite,
}
