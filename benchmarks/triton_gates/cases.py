"""Every kernel of ours as the launchers launch it: the rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .measure import Launch, fake
from .table import Case

N = K = 4096
# Rows that are compiled for every target. Of the others a kind has, the tile of 64 tokens in both types of activations,
# for cards where its registers are fewest; 512 rows dequantize.
EVERYWHERE = {
    "w4a16 g128": (1, 16, 64, 256, 512),
    "w4a16 g128 bf16": (1, 16),
    "w4a16 g128 zero": (1, 16),
    "w4a16 g32 zero": (16,),
    "w4a16 channel": (16,),
    "w8a16 channel": (1, 16, 256),
    "nf4 g64": (1, 16),
    "mxfp4": (1, 16),
    "nvfp4": (16,),
    "fp8 channel": (16,),
}
FEWEST = ("sm_80", "sm_89", "sm_90")


def cases() -> list[Case]:
    """Models' linears, 4096 x 4096, group 128, float16, unless the name says otherwise."""
    return [*_weight_only(), *_w8a8()]


def _weight_only() -> list[Case]:
    from qkit.kernels.triton import config, device, layout, ops

    def case(
        name: str, kind: str, bits: int, group: int, zero: bool, m: int, dtype: torch.dtype, only: tuple[str, ...]
    ) -> Case:
        def call() -> Any:
            words = 8 if kind == "nvfp4" else 16
            block = words * 32 // bits
            blocks = -(-K // block)
            stored = torch.uint8 if kind in ("mxfp4", "nvfp4") else torch.float16
            packed = layout.Packed(
                words=fake(blocks, N, words, dtype=torch.int32),
                scale=fake(blocks * block // group, N, dtype=stored) if group else None,
                zero=fake(blocks * block // (group or K), N, dtype=torch.uint8) if zero else None,
                row=fake(N, dtype=torch.float32),
                table=fake(2, 256, dtype=torch.int32) if kind in layout.BY_BYTES else None,
                kind=kind,
                bits=bits,
                group_size=group or K,
                out_features=N,
                in_features=K,
            )
            on = device.card(packed.device)
            chosen = config.rule(config.Key.of(packed, dtype), m, on.processors, on.amd)
            ops.run(chosen, fake(m, K, dtype=dtype), packed)

        matrix = m < 512  # 512 dequantizes for torch's matmul
        samples = {("w8a16 channel bf16", 64): ("sm_89",)}  # what spilled under another rule
        samples |= dict.fromkeys((("w4a16 g128", 1), ("w4a16 g128", 16)), ("sm_80", "sm_89", "sm_90", "gfx942"))
        weights = _tile("gemm_kernel", "dequantize_kernel")
        # nvfp4 has a scale to decode every sixteen weights: reported against the budget, not held to it
        held = m <= 16 and kind != "nvfp4"
        return Case("qkit", name, m, N, K, bits, call, weights, matrix, held, only, samples.get((name, m), ()))

    kinds = [
        ("w4a16 g128", "int", 4, 128, False),
        ("w4a16 g128 zero", "int", 4, 128, True),
        ("w4a16 g32 zero", "int", 4, 32, True),
        ("w4a16 channel", "int", 4, 0, False),
        ("w8a16 g128 zero", "int", 8, 128, True),
        ("w8a16 channel", "int", 8, 0, False),
        ("nf4 g64", "nf4", 4, 64, False),
        ("fp4 g64", "fp4", 4, 64, False),
        ("mxfp4", "mxfp4", 4, 32, False),
        ("nvfp4", "nvfp4", 4, 16, False),
        ("fp8 g128", "fp8", 8, 128, False),
        ("fp8 channel", "fp8", 8, 0, False),
    ]
    found = []
    for name, *about in kinds:
        for suffix, dtype in (("", torch.float16), (" bf16", torch.bfloat16)):
            whole = EVERYWHERE.get(name + suffix, ())
            for m in sorted({*whole, 64, *((256,) if name == "w4a16 g128 zero" else ())}):
                found.append(case(name + suffix, *about, m, dtype, () if m in whole else FEWEST))
    return found


def _w8a8() -> list[Case]:
    from qkit.kernels.triton import w8a8

    def case(name: str, kind: str, group: int, m: int) -> Case:
        def call() -> Any:
            shape = (N,) if group == 0 else (K // group, N)
            codes = fake(N, K, dtype=torch.int8 if kind == "int" else torch.uint8)
            packed = w8a8.Packed8(codes, fake(*shape, dtype=torch.float32), None, kind, N, K, group)
            w8a8.launch(fake(m, K, dtype=torch.float16), packed, None)

        sample = {("int", 0, 16): ("sm_80",), ("fp8", 0, 16): ("sm_80", "sm_90")}.get((kind, group, m), ())
        return Case("qkit", name, m, N, K, 8, call, _tile("_w8a8"), budget=m <= 16, sample=sample)

    int8, fp8, grouped = ("w8a8 int8", "int", 0), ("w8a8 fp8", "fp8", 0), ("w8a8 fp8 g128", "fp8", 128)
    rows = [(int8, 1), (int8, 16), (int8, 512), (fp8, 16), (fp8, 512), (grouped, 16)]
    return [case(*kind, m) for kind, m in rows]


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
