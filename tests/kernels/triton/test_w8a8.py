"""W8A8 in Triton's interpreter against the oracle: the codes of activations bit for bit, the products closely."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from qkit.kernels import reference
from qkit.kernels.select import KERNELS, problem
from qkit.kernels.triton import activations, device, quantized, w8a8
from qkit.kernels.weight import Weight


def make(kind: str, out: int, in_: int, groups: int, zero: bool = False) -> Weight:
    generator = torch.Generator().manual_seed(out + in_)
    codes = torch.randint(0, 256, (out, in_), generator=generator, dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0x7E  # the others are numbers, subnormal ones among them
    scale = (torch.rand(out, groups, generator=generator) * 0.01 + 0.001).bfloat16()
    zeros = torch.randint(0, 256, (out, groups), generator=generator, dtype=torch.uint8) if zero else None
    return Weight(reference.pack(codes, 8), scale, zeros, 8, in_, kind)


def stand_in(monkeypatch: pytest.MonkeyPatch, fp8: bool, processors: int = 1) -> None:
    """The card that the launchers are told of."""
    monkeypatch.setattr(device, "INTERPRETER", device.INTERPRETER._replace(fp8=fp8, processors=processors))


@pytest.mark.parametrize("at_once", [8192, 64], ids=["one read", "two reads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_activations(monkeypatch, dtype, at_once):
    monkeypatch.setattr(activations, "_AT_ONCE", at_once)
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = 0
    x[2] *= torch.logspace(-6, 0, 150)  # down to e4m3's subnormals and to zero
    x = x.to(dtype)
    for kind in activations.KINDS:
        codes, scale, sums = activations.quantize_rows(x, kind, 256)
        values, expected = reference.quantize_activations(x, kind.split()[0])
        assert torch.equal(scale, expected[:, 0])
        assert torch.equal(codes.float()[:, :150], values)
        assert not codes.float()[:, 150:].any()
        if kind == "int8":
            assert torch.equal(sums, values.sum(1).int())


@pytest.mark.parametrize("at_once", [8192, 64], ids=["one read", "two reads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_comes_out_as_nan(monkeypatch, dtype, at_once):
    """A token that holds NaN or infinity, wherever it stands, and no other token."""
    monkeypatch.setattr(activations, "_AT_ONCE", at_once)
    x = torch.randn(6, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, column, value in ((0, 3, torch.nan), (1, 149, torch.inf), (2, 70, -torch.inf), (3, 0, -torch.nan)):
        x[row, column] = value
    x[3, 1] = torch.inf
    for kind in activations.KINDS:
        _, scale, _ = activations.quantize_rows(x, kind, 256)
        assert scale[:4].isnan().all() and scale[4:].isfinite().all()
    for w, kind in ((make("int", 8, 150, 1, True), "int8"), (make("fp8", 8, 150, 1), "fp8")):
        packed, exact = w8a8.prepack(w, kind), reference.matmul(x, w, None, kind)
        for native in (True, False):
            stand_in(monkeypatch, native)
            got = w8a8.matmul(x, packed)
            assert exact[:4].isnan().all() and got[:4].isnan().all()
            assert torch.allclose(got[4:], exact[4:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("native", [True, False], ids=["e4m3", "as half"])
def test_weights_that_are_nan_stay_so(monkeypatch, native):
    stand_in(monkeypatch, native)
    w = make("fp8", 8, 150, 1)
    w.packed.view(torch.uint8)[5, 40] = 0xFF
    x = torch.randn(2, 150, generator=torch.Generator().manual_seed(0))
    got = w8a8.matmul(x, w8a8.prepack(w, "fp8"))
    assert torch.equal(got.isnan(), reference.matmul(x, w, None, "fp8").isnan()) and got[:, 5].isnan().all()


def test_scales_that_are_almost_zero():
    """Below float32's normal numbers a scale is rounded, and a value over it may be more than the largest code."""
    x = torch.tensor([[1e-45, 0], [190 * 2.0**-149, -190 * 2.0**-149], [600 * 2.0**-149, 0]])
    for kind in activations.KINDS:
        codes, scale, _ = activations.quantize_rows(x, kind, 128)
        values, expected = reference.quantize_activations(x, kind.split()[0])
        assert torch.equal(scale, expected[:, 0]) and torch.equal(codes.float()[:, :2], values)
        assert values.isfinite().all() and values[2, 0] > 0


CASES = [
    ("int", 48, 200, 1, False, torch.float16),
    ("int", 130, 100, 1, True, torch.bfloat16),
    ("int", 40, 256, 4, False, torch.float32),
    ("fp8", 48, 200, 1, False, torch.bfloat16),
    ("fp8", 130, 384, 3, False, torch.float16),
]


@pytest.mark.parametrize("native", [True, False], ids=["e4m3", "as half"])
@pytest.mark.parametrize(("kind", "out", "in_", "groups", "zero", "dtype"), CASES)
def test_matmul(monkeypatch, kind, out, in_, groups, zero, dtype, native):
    if kind == "int" and not native:
        pytest.skip("int8 has one path")
    # 64 units: a split reduction for few rows
    stand_in(monkeypatch, native, 64)
    w = make(kind, out, in_, groups, zero)
    activations_kind = "int8" if kind == "int" else "fp8"
    packed = w8a8.prepack(w, activations_kind)
    assert torch.equal(w8a8.dequantize(packed, torch.float32), reference.dequantize_weight(w, torch.float32))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(1)).to(dtype)
    # the interpreter cuts bfloat16 off where a card rounds
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 2**-7}[dtype]
    for rows in ((1,), (70,) if native and out == 48 else (2, 9)):
        x = torch.randn(*rows, in_, generator=torch.Generator().manual_seed(2)).to(dtype)
        got, exact = w8a8.matmul(x, packed, bias), reference.matmul(x, w, bias, activations_kind)
        assert got.dtype == dtype and got.shape == exact.shape
        assert (got.float() - exact.float()).norm() <= tolerance * exact.float().norm()
    assert w8a8.matmul(x[:0], packed).shape == (0, *x.shape[1:-1], out)
    if kind == "int" and zero:
        shifted = torch.zeros(2, 9, in_ + 1, dtype=dtype)[..., 1:].copy_(x)  # rows that start at odd addresses
        assert torch.equal(w8a8.matmul(shifted, packed, bias), got)


def test_split_is_deterministic_and_chosen_by_size():
    few = w8a8.tiles(1, 4096, 4096, 0, False, 132)
    assert (few.block_m, few.split_k) == (16, 4) and w8a8.tiles(2, 4096, 4096, 0, False, 132) == few
    assert w8a8.tiles(512, 4096, 4096, 0, False, 132).split_k == 1
    assert w8a8.tiles(1, 128256, 4096, 0, False, 132).split_k == 1
    assert w8a8.tiles(1, 4096, 4096, 64, False, 132).block_k == 64


def test_op_is_opaque_and_differentiable():
    w = make("int", 48, 96, 1, True)
    packed = w8a8.prepack(w, "int8")
    x = torch.randn(3, 96, requires_grad=True)
    w8a8.matmul(x, packed).sum().backward()
    straight_through = reference.dequantize_weight(w, torch.float32).sum(0)
    assert x.grad is not None and torch.allclose(x.grad, straight_through.expand(3, -1), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(w8a8._op, (x.detach(), None, *packed.parts()), test_utils=("test_schema", "test_faketensor"))


def test_entry_of_select():
    (entry,) = (k for k in KERNELS if k.name == "triton-w8a8")
    for w, kind in ((make("int", 48, 96, 1, True), "int8"), (make("fp8", 40, 128, 2), "fp8")):
        state = entry.prepack(w, kind)
        x = torch.randn(2, w.in_features)
        assert torch.allclose(entry.matmul(x, state, None), reference.matmul(x, w, None, kind), rtol=1e-4, atol=1e-4)
        back = entry.restore(state)
        assert torch.equal(back.packed, w.packed) and torch.equal(back.scale, w.scale) and back.kind == w.kind
        assert back.zero is w.zero
        held = (state.packed.codes, state.packed.scale, state.packed.shift, w.scale, w.zero)
        assert [id(t) for t in state.tensors()] == [id(t) for t in held if t is not None]
        p = problem(w, torch.float16, kind)
        assert "not on cpu" in str(entry.supports(p))
        assert quantized.supports(replace(p, device=torch.device("cuda"))) is None
        assert "int8 or fp8" in str(quantized.supports(replace(p, activations=None)))


def test_wrong_inputs_are_refused():
    packed = w8a8.prepack(make("int", 48, 96, 1), "int8")
    with pytest.raises(TypeError, match="float64"):
        w8a8.matmul(torch.zeros(2, 96, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match=r"\(2, 95\).*96"):
        w8a8.matmul(torch.zeros(2, 95), packed)
    with pytest.raises(ValueError, match=r"\(47,\).*48"):
        w8a8.matmul(torch.zeros(2, 96), packed, torch.zeros(47))
    with pytest.raises(ValueError, match="x is on meta"):
        w8a8.matmul(torch.zeros(2, 96, device="meta"), packed)
    with pytest.raises(ValueError, match="not 8-bit int by fp8"):
        w8a8.prepack(make("int", 48, 96, 1), "fp8")
    with pytest.raises(ValueError, match="groups that are multiples of 64, not 32 of 96"):
        w8a8.prepack(make("int", 48, 96, 3), "int8")
    with pytest.raises(ValueError, match="zero points with one scale a row"):
        w8a8.prepack(make("int", 48, 128, 2, True), "int8")
    with pytest.raises(ValueError, match="kind must be one of"):
        activations.quantize_rows(torch.zeros(1, 4), "int4", 4)
