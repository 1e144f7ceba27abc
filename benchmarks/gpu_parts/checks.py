"""Every GPU kernel against the oracle, on the device it will be timed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from qkit.kernels import reference
from qkit.kernels.weight import Weight

WEIGHT_ONLY = (
    # kind, bits, groups of 128 or as named, zero points
    ("int", 4, 128, False),
    ("int", 4, 128, True),
    ("int", 4, 32, True),
    ("int", 4, 0, False),
    ("int", 8, 128, True),
    ("int", 8, 0, False),
    ("nf4", 4, 64, False),
    ("fp4", 4, 64, False),
    ("mxfp4", 4, 32, False),
    ("nvfp4", 4, 16, False),
    ("fp8", 8, 0, False),
    ("fp8", 8, 128, False),
)
SHAPES = ((384, 512), (1000, 672), (4096, 4096))  # out, in; 672 ends within a block, 4096 is split
ROWS = (1, 3, 16, 40, 65, 300, 520)  # a tile of the rule each


def make(kind: str, bits: int, group: int, zero: bool, shape: tuple[int, int], device: str) -> Weight:
    """A random weight whose dequantized values are about as large as a model's."""
    out, in_ = shape
    generator = torch.Generator().manual_seed(out * in_ + bits)
    codes = torch.randint(0, 1 << bits, (out, in_), generator=generator, dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0x7E
    groups = in_ // group if group else 1
    size = {"int": 0.1 / (1 << bits), "fp8": 1e-4}.get(kind, 0.02)
    scale = (torch.rand(out, groups, generator=generator) + 0.5) * size
    if kind == "mxfp4":
        scale = torch.randint(118, 122, (out, groups), generator=generator, dtype=torch.uint8)
    elif kind == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
    else:
        scale = scale.half()
    zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8) if zero else None
    moved = [None if t is None else t.to(device) for t in (reference.pack(codes, bits), scale, zeros)]
    return Weight(moved[0], moved[1], moved[2], bits, in_, kind)  # type: ignore[arg-type]


def ratio(got: torch.Tensor, exact: torch.Tensor, low: torch.Tensor) -> float:
    """The error of `got` over what rounding alone costs: the error of torch's product in the same precision."""
    floor = max(float((low.float() - exact).norm()), 2**-11 * float(exact.norm()))
    return float((got.float() - exact).norm()) / floor


def _weight_only(device: str, shapes: Any, rows: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    from qkit.kernels import triton

    for about in WEIGHT_ONLY:
        for shape in shapes:
            if about[2] and shape[1] % about[2]:
                continue
            for dtype in (torch.float16, torch.bfloat16):

                def check(about: Any = about, shape: Any = shape, dtype: torch.dtype = dtype) -> float:
                    w = make(*about, shape, device)
                    packed = triton.prepack(w)
                    plain = reference.dequantize_weight(w, torch.float32)
                    worst = 0.0
                    for m in rows:
                        x = torch.randn(m, shape[1], device=device).to(dtype)
                        bias = torch.randn(shape[0], device=device).to(dtype)
                        exact = x.float() @ plain.t() + bias.float()
                        low = torch.nn.functional.linear(x, plain.to(dtype), bias)
                        worst = max(worst, ratio(triton.linear(x, packed, bias), exact, low))
                    return worst

                yield f"{about[0]}{about[1]} g{about[2]}{' zero' * about[3]} {shape} {str(dtype)[6:]}", check


def _w8a8(device: str, shapes: Any, rows: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    from qkit.kernels.triton import w8a8

    for kind, group, zero in (
        ("int", 0, False),
        ("int", 0, True),
        ("int", 64, False),
        ("fp8", 0, False),
        ("fp8", 128, False),
    ):
        for shape in shapes:
            if group and shape[1] % group:
                continue

            def check(kind: str = kind, group: int = group, zero: bool = zero, shape: Any = shape) -> float:
                w, activations = make(kind, 8, group, zero, shape, device), "int8" if kind == "int" else "fp8"
                packed = w8a8.prepack(w, activations)
                worst = 0.0
                for m in rows:
                    x = torch.randn(m, shape[1], device=device, dtype=torch.float16)
                    exact = reference.matmul(x.float(), w, None, activations)
                    worst = max(worst, ratio(w8a8.matmul(x, packed), exact, exact.half()))
                return worst

            yield f"w8a8 {kind} g{group}{' zero' * zero} {shape}", check


def checks(device: str, small: bool = False) -> Iterator[tuple[str, Callable[[], float], float]]:
    """(name, check -> error over what rounding costs, the most it may be). small: for the interpreter.

    Bounds: twice the low-precision error for weight-only products; W8A8 may differ where a sum is rounded to float16
    twice.
    """
    shapes = ((128, 128),) if small else SHAPES
    rows = (3,) if small else ROWS
    for name, check in _weight_only(device, shapes, rows):
        yield name, check, 2.0
    for name, check in _w8a8(device, shapes, rows):
        yield name, check, 2.0


class Outcome(NamedTuple):
    """What came of one check: its error over the bound, and what is wrong, or ""."""

    name: str
    fault: str
    over_bound: float


def outcome(number: int, device: str, small: bool) -> Outcome:
    """Runs check `number`. A kernel that does not launch is a failure to report, like a wrong one."""
    name, run, bound = list(checks(device, small))[number]
    try:
        error = run()
    except Exception as fault:
        return Outcome(name, f"{type(fault).__name__}: {str(fault)[:200]}", 0.0)
    wrong = "" if error <= bound else f"{error:.2f} times the error of rounding, at most {bound:g}"
    return Outcome(name, wrong, error / bound)
