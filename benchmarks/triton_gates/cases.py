"""Every kernel of ours as the launchers launch it: the rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .measure import Launch, fake
from .table import Case

N = K = 4096


def cases() -> list[Case]:
    """Models' linears, 4096 x 4096, group 128, float16, unless the name says otherwise."""
    return [*_weight_only(), *_w8a8(), *_moe()]


def _weight_only() -> list[Case]:
    from qkit.kernels.triton import config, ops

    def case(name: str, kind: str, bits: int, group: int, m: int, zero: bool, dtype: torch.dtype) -> Case:
        def call() -> Any:
            plane = 16 if kind == "nvfp4" else 32
            words = fake(K * bits // (16 * plane), N, plane // 2, dtype=torch.int32)
            stored = torch.uint8 if kind in ("mxfp4", "nvfp4") else torch.float16
            scale = fake(K // group, N, dtype=stored) if group else None
            zeros = fake(K // (group or K), N, dtype=torch.uint8) if zero else None
            table = fake(2, 256, dtype=torch.int32) if kind in ("nf4", "fp4") else None
            key = config.Key(kind, bits, group, zero, dtype, N, K)
            units = torch.cuda.get_device_properties(0).multi_processor_count
            amd = torch.version.hip is not None
            chosen = config.rule(key, m, units, amd)
            ops.ASM = not amd
            row = fake(N, dtype=torch.float32)
            x = fake(m, K, dtype=dtype)
            ops.run(chosen, x, words, scale, zeros, row, table, None, kind, bits, group or K, N, K, False)

        matrix = m > 1 and m < 512  # M = 1 is a dot product, 512 dequantizes for torch's matmul
        sample = ("sm_80", "sm_89", "sm_90", "gfx942") if (name, m) in (("w4a16 g128", 1), ("w4a16 g128", 16)) else ()
        weights = _tile("gemv_kernel", "gemm_kernel", "dequantize_kernel")
        # nvfp4 has a scale to decode every sixteen weights: reported against the budget, not held to it
        held = m <= 16 and kind != "nvfp4"
        return Case("qkit", name, m, N, K, bits, call, weights, matrix, held, sample=sample)

    half, brain = torch.float16, torch.bfloat16
    kinds: list[tuple[str, str, int, int, bool, torch.dtype, tuple[int, ...]]] = [
        ("w4a16 g128", "int", 4, 128, False, half, (1, 16, 64, 256, 512)),
        ("w4a16 g128 bf16", "int", 4, 128, False, brain, (1, 16)),
        ("w4a16 g128 zero", "int", 4, 128, True, half, (1, 16)),
        ("w4a16 g32 zero", "int", 4, 32, True, half, (16,)),
        ("w4a16 channel", "int", 4, 0, False, half, (16,)),
        ("w8a16 channel", "int", 8, 0, False, half, (1, 16, 256)),
        ("nf4 g64", "nf4", 4, 64, False, half, (1, 16)),
        ("mxfp4", "mxfp4", 4, 32, False, half, (1, 16)),
        ("nvfp4", "nvfp4", 4, 16, False, half, (16,)),
        ("fp8 channel", "fp8", 8, 0, False, half, (16,)),
    ]
    return [case(name, kind, bits, group, m, zero, t) for name, kind, bits, group, zero, t, ms in kinds for m in ms]


def _w8a8() -> list[Case]:
    from qkit.kernels.triton import w8a8

    def case(name: str, kind: str, group: int, m: int) -> Case:
        def call() -> Any:
            shape = (N,) if group == 0 else (K // group, N)
            codes = fake(N, K, dtype=torch.int8 if kind == "int" else torch.uint8)
            packed = w8a8.Packed8(codes, fake(*shape, dtype=torch.float32), None, kind, N, K, group)
            w8a8._card.cache_clear()
            w8a8.launch(fake(m, K, dtype=torch.float16), packed, None)

        sample = {("int", 0, 16): ("sm_80",), ("fp8", 0, 16): ("sm_80", "sm_90")}.get((kind, group, m), ())
        return Case("qkit", name, m, N, K, 8, call, _tile("_w8a8"), budget=m <= 16, sample=sample)

    int8, fp8, grouped = ("w8a8 int8", "int", 0), ("w8a8 fp8", "fp8", 0), ("w8a8 fp8 g128", "fp8", 128)
    rows = [(int8, 1), (int8, 16), (int8, 512), (fp8, 16), (fp8, 512), (grouped, 16)]
    return [case(*kind, m) for kind, m in rows]


def _moe() -> list[Case]:
    """Mixtral's experts: gate and up in one product, 2 * 14336 x 4096, two of eight experts a token."""
    from qkit.kernels.triton import moe

    out, hidden, experts, top_k = 28672, 4096, 8, 2

    def case(name: str, kind: str, group: int, m: int) -> Case:
        def call() -> Any:
            block_m = moe.block_rows(m * top_k, experts)
            blocks = min(m * top_k, -(-m * top_k // block_m) + experts)
            words = fake(experts, hidden // 128, out, 16, dtype=torch.int32)
            kept = torch.float16 if kind == "int" else torch.uint8
            scale = fake(experts, hidden // group, out, dtype=kept)
            w = moe.Experts(
                words, scale, None, fake(experts, out, dtype=torch.float32), None, kind, 4, out, hidden, group, True
            )
            ids = fake(blocks * block_m, dtype=torch.int32), fake(blocks, dtype=torch.int32)
            moe._card.cache_clear()
            moe.launch(fake(m, hidden, dtype=torch.float16), w, *ids, top_k, m * top_k)

        sample = ("sm_90",) if (kind, m) == ("int", 16) else ()
        return Case("qkit", name, m, out, hidden, 4, call, _tile("_experts"), budget=m <= 16, sample=sample)

    return [
        case(*kind, m) for kind in (("moe w4a16 g128", "int", 128), ("moe mxfp4", "mxfp4", 32)) for m in (1, 16, 512)
    ]


def _tile(*kernels: str) -> Callable[[Launch], int | None]:
    """The weights one turn of the loop of these kernels takes in."""

    def weights(launch: Launch) -> int | None:
        a = launch.arguments
        if launch.name not in kernels:
            return None
        if "WORDS" in a:  # the layout of `qkit.kernels.triton.layout`: words of 32 bits for each of BN outputs
            return a["BN"] * a["WORDS"] * 32 // a["BITS"]
        return a["BLOCK_N"] * a["BLOCK_K"]

    return weights
