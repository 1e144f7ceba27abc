"""Which kernel is chosen, and that each multiplies as well as dequantized weights in the activations' type do."""

from __future__ import annotations

import pytest
import torch

from qkit import kernels
from qkit.kernels import reference
from qkit.kernels.cpu import lib
from qkit.kernels.select import KERNELS, Weight, select

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantized(rows: int, cols: int, group_size: int, bits: int, symmetric: bool) -> tuple:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    codes, scale, zero, *_ = kernels.quantize_rtn(w, bits, group_size, symmetric, "BF16")
    groups = scale.shape[1]
    z = float(1 << (bits - 1)) if zero is None else zero.double().unsqueeze(-1)
    exact = (codes.double().view(rows, groups, -1) - z) * scale.double().unsqueeze(-1)
    return kernels.pack(codes, bits), scale, zero, exact.view(rows, cols)


def errors(
    y: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None
) -> tuple[float, float, float]:
    """|error| of y, of the same product with weights rounded to x's type, and a float32 floor."""
    truth = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    low = torch.nn.functional.linear(x, exact.to(x.dtype), bias).double()
    return float((y.double() - truth).norm()), float((low - truth).norm()), 1e-6 * float(truth.norm())


@pytest.mark.parametrize("kernel", [k for k in KERNELS if "triton" not in k.name], ids=lambda k: k.name)
@pytest.mark.parametrize("lead", [(1,), (8,), (9,), (2, 7), (3, 1, 2), ()])
def test_matmul_of_any_shape(kernel: object, lead: tuple[int, ...]) -> None:
    packed, scale, zero, exact = quantized(24, 128, 64, 4, False)
    state = kernel.prepack(Weight(packed, scale, zero, 4, 128), None)
    for dtype in FLOATS:
        x = torch.randn(*lead, 128).to(dtype)
        bias = torch.randn(24).to(dtype)
        y = kernel.matmul(x, state, bias)
        assert y.shape == (*lead, 24) and y.dtype == dtype
        error, low, floor = errors(y, x, exact, bias)
        assert error <= 1.3 * low + floor


def test_gradients_reach_the_activations() -> None:
    packed, scale, zero, exact = quantized(24, 128, 64, 4, True)
    kernel = select(Weight(packed, scale, zero, 4, 128), torch.float32)
    x = torch.randn(2, 128, requires_grad=True)
    kernel.matmul(x, kernel.prepack(Weight(packed, scale, zero, 4, 128), None), None).sum().backward()
    assert torch.allclose(x.grad, exact.float().sum(0).expand(2, -1), atol=1e-4)


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(cols: int = 256, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **kwargs: object) -> str:
        packed = torch.zeros(64, -(-cols // 8), dtype=torch.int32, device=device)
        scale = torch.ones(64, 1, device=device)
        return select(Weight(packed, scale, None, 4, cols), dtype, **kwargs).name

    assert name() == ("reference" if isinstance(lib.load(), str) else "cpu")
    assert KERNELS[-1].name == "reference"
    # float64 and other devices are not for the C++ kernels.
    assert name(dtype=torch.float64) == "reference"
    assert name(device="meta") == "reference"
    with pytest.raises(ValueError, match="'int7'"):
        name(activations="int7")
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    assert name() == "reference"
    with pytest.raises(ValueError, match="not 3"):
        Weight(torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 1), None, 3, 32)


def test_prepack_refuses_what_does_not_fit() -> None:
    packed, scale, zero, _ = quantized(24, 128, 64, 4, True)
    kernel = select(Weight(packed, scale, zero, 4, 128), torch.bfloat16)
    with pytest.raises(ValueError, match="take 15 words"):
        Weight(packed, scale, None, 4, 120)
    with pytest.raises(ValueError, match="128 inputs"):
        kernel.matmul(torch.randn(1, 64), kernel.prepack(Weight(packed, scale, None, 4, 128), None), None)


def test_reference_is_the_plain_product() -> None:
    packed, scale, zero, exact = quantized(24, 128, 64, 8, False)
    x = torch.randn(3, 128)
    expected = torch.nn.functional.linear(x, exact.float())
    assert torch.allclose(reference.matmul(x, Weight(packed, scale, zero, 8, 128)), expected, rtol=1e-5, atol=1e-5)
