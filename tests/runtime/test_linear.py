"""QuantLinear: the same product as its dequantized weight, wherever it is copied to."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from weights import random_weight

from qkit.kernels.codes import codes_of, values_of, weight_of
from qkit.runtime import QuantLinear
from qkit.spec import CHANNEL, LayerSpec, integer

SCHEMES = [integer(b, g, s, d) for b in (4, 8) for g in (CHANNEL, 32) for s in (True, False) for d in ("BF16", "F16")]


def make(scheme: LayerSpec, out: int = 33, in_: int = 96, bias: bool = True) -> QuantLinear:
    q = random_weight(out, in_, scheme)
    q = weight_of(codes_of(q), q.scale * 0.01, q.zero, q.bits)
    return QuantLinear(q, torch.randn(out).to(torch.bfloat16) if bias else None)


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.describe()} {s.scale_dtype}")
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_within_twice_the_low_precision_error(scheme, rows, dtype):
    layer = make(scheme)
    torch.manual_seed(0)
    x = torch.randn(*rows, 96).to(dtype)
    y = layer(x)
    assert y.shape == (*rows, 33) and y.dtype == dtype
    weight, bias = layer.dequantize(torch.float64), layer.bias.double()
    exact = nn.functional.linear(x.double(), weight, bias)
    plain = nn.functional.linear(x, weight.to(dtype), bias.to(dtype))
    floor = 1e-6 * float(exact.abs().mean())  # float32: the plain product may be exact by luck
    assert rmse(y, exact) <= 2 * rmse(plain, exact) + floor


@pytest.mark.parametrize("in_", [5, 123, 96])
def test_ragged_channelwise(in_):
    layer = make(integer(4, CHANNEL, False), out=7, in_=in_)
    x = torch.randn(4, in_)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias.float()))


def test_qtensor_comes_back():
    q = random_weight(33, 96, integer(4, 32, symmetric=False))
    back = QuantLinear(q).quantized()
    assert (
        torch.equal(codes_of(back), codes_of(q)) and torch.equal(back.scale, q.scale) and torch.equal(back.zero, q.zero)
    )
    assert torch.equal(QuantLinear(q).dequantize(), values_of(q))


def test_weights_stay_packed():
    layer = make(integer(4, 32), out=256, in_=512, bias=False)
    layer(torch.randn(1, 512).to(torch.bfloat16))
    held = sum(b.numel() * b.element_size() for b in layer.state_dict().values())
    assert held == 256 * 512 // 2 + 256 * 16 * 2
    # 256 outputs are whole blocks of the kernels' layout: nothing is padded.
    assert sum(t.nbytes for t in layer.tensors()) == held


def test_state_dict_round_trip_replaces_what_was_computed_before():
    a, b = make(integer(4, 32, symmetric=False)), make(integer(4, 32, symmetric=False))
    b.packed.zero_()
    x = torch.randn(3, 96).to(torch.bfloat16)
    assert not torch.equal(a(x), b(x))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file))
    assert torch.equal(a(x), b(x))
    assert list(a.state_dict()) == ["packed", "scale", "zero", "bias"]


def test_deepcopy_shares_nothing():
    a = make(integer(8, 32))
    x = torch.randn(3, 96).to(torch.bfloat16)
    before = a(x)
    b = copy.deepcopy(a)
    a.load_state_dict({**a.state_dict(), "packed": torch.zeros(33, 24, dtype=torch.int32)})
    assert torch.equal(b(x), before) and not torch.equal(a(x), before)


def test_casts_keep_the_scale_and_follow_the_input():
    layer = make(integer(4, 32, scale_dtype="F16"))
    scale = layer.scale.clone()
    layer.to(torch.bfloat16).float().to("cpu")
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, scale)
    assert layer.bias.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.ones(2, 96, dtype=dtype)).dtype == dtype


def test_a_chosen_kernel_keeps_one_copy_and_loses_nothing():
    layer = make(integer(4, 128, False), out=40, in_=256)
    x = torch.randn(3, 256).bfloat16()
    plain = copy.deepcopy(layer)
    expected = plain(x)
    buffers = {name: t.clone() for name, t in layer.state_dict().items()}
    kernel = layer.select(torch.bfloat16)
    if kernel.name == "reference":
        pytest.skip("the reference kernel works on the buffers themselves")
    assert layer.packed is None and layer.scale is None and layer.zero is None
    assert sum(t.nbytes for t in layer.tensors()) < 1.3 * sum(t.nbytes for t in buffers.values()) + 64 * 256
    assert torch.equal(layer(x), expected)
    assert torch.equal(codes_of(layer.quantized()), codes_of(plain.quantized())) and torch.equal(
        layer.dequantize(), plain.dequantize()
    )
    state = layer.state_dict()
    assert state.keys() == buffers.keys() and all(torch.equal(state[n], buffers[n]) for n in buffers)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.packed is not None and torch.equal(copied(x), expected)
    assert torch.equal(layer(x.float()), plain(x.float()))  # another type of activations
    layer.to(torch.float16)
    assert torch.equal(layer(x), expected)
    layer.load_state_dict({**buffers, "packed": torch.zeros_like(buffers["packed"])})
    assert not codes_of(layer.quantized()).any() and not torch.equal(layer(x), expected)


def test_moves_between_devices():
    layer = make(integer(4, 32, symmetric=False))
    layer(torch.ones(1, 96))
    meta = copy.deepcopy(layer).to("meta")
    assert {b.device.type for b in meta.buffers()} == {"meta"}
    assert meta.select(torch.float32).name == "reference"
    assert layer.select(torch.float32) is layer.select(torch.float32)


def test_repr_says_scheme_and_kernel():
    layer = make(integer(4, 32))
    assert "int4 symmetric g32" in repr(layer) and "not chosen yet" in repr(layer)
    layer(torch.ones(1, 96))
    assert layer.select(torch.float32).name in repr(layer)


def test_reference_kernels_on_request(monkeypatch):
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    assert make(integer(4, 32)).select(torch.float32).name == "reference"
