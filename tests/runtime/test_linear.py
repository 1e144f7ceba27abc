"""QuantLinear: the same product as its dequantized weight, wherever it is copied to."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from weights import random_weight

import qkit
from qkit.kernels import reference
from qkit.kernels.codes import codes_of, values_of, weight_of
from qkit.kernels.select import KERNELS, Kernel, Weight
from qkit.measure import memory
from qkit.runtime import QuantLinear, linear
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


class Slots:
    __slots__ = ("codes", "rest")


@dataclass(frozen=True, slots=True)
class Part:
    codes: torch.Tensor
    kind: str = "int"


@dataclass(frozen=True)
class Whole:
    part: Part
    zero: None = None


def in_slots(weight: Weight) -> Slots:
    state = Slots()
    state.codes, state.rest = weight.packed + 0, (weight.scale, weight.packed)
    return state


STATES: dict[str, Any] = {
    "slots": (in_slots, lambda s: s.codes),
    "dataclass in a dataclass": (lambda w: Whole(Part(w.packed + 0)), lambda s: s.part.codes),
    "tuple": (lambda w: (w.packed + 0, 3, None, "int"), lambda s: s[0]),
    "dict in a list": (lambda w: [{"codes": w.packed + 0}], lambda s: s[0]["codes"]),
}


def kernel_of(prepack: Any, codes: Any, scale: torch.Tensor, name: str = "other") -> Kernel:
    """A kernel of 4-bit symmetric weights whose state is what `prepack` makes."""

    def weight(state: Any) -> Weight:
        return Weight(codes(state), scale, None, 4, codes(state).shape[1] * 8)

    def matmul(x: torch.Tensor, state: Any, bias: torch.Tensor | None) -> torch.Tensor:
        return reference.matmul(x, weight(state), bias)

    return Kernel(name, lambda p: None, lambda w, activations: prepack(w), matmul, weight)


@pytest.mark.parametrize("kind", STATES)
def test_tensors_whatever_a_kernels_state_is(kind, monkeypatch):
    layer = make(integer(4, 32))
    expected, held = layer.dequantize(), layer.packed.nbytes
    prepack, codes = STATES[kind]
    monkeypatch.setattr(linear, "select", lambda *given: kernel_of(prepack, codes, layer.scale))
    x = torch.randn(2, 96)
    layer(x)
    assert layer.packed is None and layer.qweight.dtype == torch.int32
    assert {t.data_ptr() for t in layer.tensors()} >= {layer.qweight.data_ptr(), layer.bias.data_ptr()}
    assert sum(t.nbytes for t in layer.tensors()) >= held
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize(
    ("name", "scheme", "activations"),
    [("triton", integer(4, 32), None), ("triton", integer(4, 32, False), None), ("triton-w8a8", integer(8), "int8")],
)
def test_lora_and_memory_on_tritons_kernels(name, scheme, activations, monkeypatch):
    """In Triton's interpreter."""
    pytest.importorskip("triton")
    peft = pytest.importorskip("peft")
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    monkeypatch.setattr(linear, "select", lambda *given: kernel)
    weight = random_weight(40, 128, scheme)
    packed = weight.packed.nbytes
    layer = QuantLinear(weight, activations=activations)
    assert layer.select(torch.bfloat16).name == name and layer.packed is None
    assert layer.qweight.device.type == "cpu"
    assert memory.weights_of([layer], None).packed >= packed
    model = nn.Sequential(layer, nn.LayerNorm(40, dtype=torch.bfloat16))  # PEFT looks at the first parameter
    adapted = peft.get_peft_model(model, qkit.lora(peft.LoraConfig(target_modules=["0"], r=4)))
    assert adapted(torch.randn(2, 128).bfloat16()).shape == (2, 40)


def test_tensors_are_counted_once(monkeypatch):
    """The reference works on the buffers: they are its state."""
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    layer = make(integer(4, 32, symmetric=False))
    held = sum(t.nbytes for t in layer.tensors())
    layer(torch.ones(1, 96))
    assert sum(t.nbytes for t in layer.tensors()) == held == sum(b.nbytes for b in layer.buffers())


def in_threads(*calls: Any) -> list[Any]:
    """What the calls returned, each in a thread of its own; what one raised is raised here."""
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def slow(monkeypatch: Any, layer: QuantLinear, meanwhile: Any) -> list[int]:
    """A kernel whose `prepack` copies the codes and is not back before `meanwhile()` is. Returns the list of calls."""
    calls: list[int] = []

    def prepack(weight: Weight) -> torch.Tensor:
        calls.append(len(calls))
        codes = weight.packed + 0
        meanwhile()
        return codes

    scale = layer.scale
    monkeypatch.setattr(linear, "select", lambda *given: kernel_of(prepack, lambda state: state, scale))
    return calls


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_weight_is_prepared_once_whatever_calls_first(dtypes, monkeypatch):
    layer = make(integer(4, 32), bias=False)
    expected = layer.dequantize()
    together = threading.Barrier(2)

    def meanwhile() -> None:
        with suppress(threading.BrokenBarrierError):  # the other one waits for the lock
            together.wait(0.5)

    calls = slow(monkeypatch, layer, meanwhile)
    x = torch.randn(2, 96)
    ys = in_threads(*(lambda dtype=dtype: layer(x.to(dtype)) for dtype in dtypes))
    assert len(calls) == len(set(dtypes)) and together.broken
    for y, dtype in zip(ys, dtypes, strict=True):
        torch.testing.assert_close(y, nn.functional.linear(x.to(dtype), expected.to(dtype)), atol=2e-2, rtol=2e-2)
    assert torch.equal(layer.dequantize(), expected)
    assert layer.packed is None and len(layer.tensors()) == len(set(dtypes))


@pytest.mark.parametrize("change", ["load_state_dict", "to"])
def test_what_is_loaded_while_a_weight_is_prepared_stays(change, monkeypatch):
    """Not what the other thread had begun with."""
    layer = make(integer(4, 32), bias=False)
    wanted = {**layer.state_dict(), "packed": torch.zeros_like(layer.packed)}
    begun, done = threading.Event(), threading.Event()

    def meanwhile() -> None:
        begun.set()
        done.wait(0.5)

    slow(monkeypatch, layer, meanwhile)

    def load() -> None:
        begun.wait(10)
        layer.load_state_dict(wanted) if change == "load_state_dict" else layer.to("meta")
        done.set()

    in_threads(lambda: layer.select(torch.float32), load)
    if change == "to":
        assert {t.device.type for t in layer.tensors()} == {"meta"}
    else:
        assert all(torch.equal(t, wanted[name]) for name, t in layer.state_dict().items())
