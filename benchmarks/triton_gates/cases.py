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
    return [*_w8a8()]


def _w8a8() -> list[Case]:
    from qkit.kernels.triton import w8a8

    def case(name: str, kind: str, group: int, m: int) -> Case:
        def call() -> Any:
            shape = (N,) if group == 0 else (K // group, N)
            codes = fake(N, K, dtype=torch.int8 if kind == "int" else torch.uint8)
            packed = w8a8.Packed8(codes, fake(*shape, dtype=torch.float32), None, kind, N, K, group)
            w8a8._card.cache_clear()
            w8a8.launch(fake(m, K, dtype=torch.float16), packed, None)

        return Case("qkit", name, m, N, K, 8, call, _tile("_w8a8"), budget=m <= 16)

    kinds = (("w8a8 int8", "int", 0), ("w8a8 fp8", "fp8", 0), ("w8a8 fp8 g128", "fp8", 128))
    return [case(*kind, m) for kind in kinds for m in (1, 16, 512)]


def _tile(kernel: str) -> Callable[[Launch], int | None]:
    """The weights one turn of the loop of `kernel` takes in: BLOCK_N * BLOCK_K."""
    return lambda launch: launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_K"] if launch.name == kernel else None
