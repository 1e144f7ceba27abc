"""Weight-only products in Triton's interpreter, against the oracle and within the error of a product in x's type."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from qkit.kernels import reference, triton
from qkit.kernels.select import KERNELS, Weight, problem
from qkit.kernels.triton import config, device, layout, ops
from qkit.kernels.triton.config import Config

DTYPES = (torch.float16, torch.bfloat16)
# kind, bits, group size (0: one scale a row), zero points, type of the stored scales
WEIGHTS = [
    ("int", 4, 32, False, torch.bfloat16),
    ("int", 4, 32, True, torch.float16),
    ("int", 4, 64, True, torch.bfloat16),
    ("int", 4, 96, False, torch.float16),
    ("int", 4, 128, False, torch.bfloat16),
    ("int", 4, 128, True, torch.float32),
    ("int", 4, 384, True, torch.float16),
    ("int", 4, 0, False, torch.float32),
    ("int", 4, 0, True, torch.float32),
    ("int", 8, 32, True, torch.bfloat16),
    ("int", 8, 128, False, torch.float16),
    ("int", 8, 0, True, torch.float32),
    ("nf4", 4, 64, False, torch.float32),
    ("fp4", 4, 32, False, torch.float32),
    ("mxfp4", 4, 32, False, torch.uint8),
    ("nvfp4", 4, 16, False, torch.float8_e4m3fn),
    ("fp8", 8, 0, False, torch.float32),
    ("fp8", 8, 128, False, torch.bfloat16),
]
IDS = [f"{k}{b}-g{g}{'-zero' if z else ''}" for k, b, g, z, _ in WEIGHTS]
SMALL = Config("gemm", 8, 32, 4, 2, 1)
SPLIT = Config("gemm", 16, 32, 4, 2, 3)
LARGE = Config("gemm", 64, 32, 8, 2, 1)  # scales weights, not sums
DEQUANTIZE = Config("dequantize", 0, 0, 0, 0, 1)


def make(kind: str, bits: int, group: int, zero: bool, scale_dtype: torch.dtype, out: int, in_: int) -> Weight:
    g = torch.Generator().manual_seed(out * in_ + bits)
    codes = torch.randint(0, 1 << bits, (out, in_), generator=g, dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0x7E  # the two NaNs
    groups = in_ // group if group else 1
    if kind == "mxfp4":
        scale = torch.randint(110, 124, (out, groups), generator=g, dtype=torch.uint8)
    elif kind == "nvfp4":
        scale = (torch.rand(out, groups, generator=g) * 440).to(scale_dtype)
    else:
        # Scales that float16 could not hold without the row's power of two.
        scale = (torch.rand(out, groups, generator=g) * 0.01 + 1e-4).to(scale_dtype)
    zeros = torch.randint(0, 1 << bits, (out, groups), generator=g, dtype=torch.uint8) if zero else None
    return Weight(reference.pack(codes, bits), scale, zeros, bits, in_, kind, 0.001 if kind == "nvfp4" else 1.0)


def close(y: torch.Tensor, x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> None:
    exact = reference.dequantize_weight(w, torch.float32).double()
    truth = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    low = torch.nn.functional.linear(x, exact.to(x.dtype), bias).double()
    error, allowed = float((y.double() - truth).norm()), float((low - truth).norm())
    # Grouped float32 scales are rounded to float16: one error for a whole group, on top of the weights' own.
    times = 3 if w.scale.dtype == torch.float32 and w.scale.shape[1] > 1 else 2
    assert error <= times * allowed + 1e-6 * float(truth.norm()), error / allowed


@pytest.mark.parametrize("weight", WEIGHTS, ids=IDS)
def test_prepack_loses_nothing(weight: tuple) -> None:
    for out, in_ in ((1, 384), (33, 384), (130, 768)):
        w = make(*weight, out, in_)
        state = triton.layer(w)
        assert torch.equal(layout.codes(state.packed), reference.unpack(w.packed, w.bits, in_))
        back = triton.restore(state)
        for name in ("packed", "scale", "zero"):
            a, b = getattr(back, name), getattr(w, name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)))
        assert dataclasses.replace(back, packed=w.packed, scale=w.scale, zero=w.zero) == w
        held = [state.packed.words, state.packed.scale, state.packed.zero, state.packed.row, state.packed.table]
        expected = [id(t) for t in (*held, state.scale) if t is not None]
        assert [id(t) for t in state.tensors()] == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS, ids=IDS)
def test_products(weight: tuple, dtype: torch.dtype) -> None:
    in_ = 384 if weight[2] in (96, 384) else 256
    w = make(*weight, 17, in_)
    p = layout.prepack(w)
    for c, m in ((SPLIT, 5), (LARGE, 3), (SMALL, 1)):
        x = torch.randn(m, in_, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(17, generator=torch.Generator().manual_seed(m)).to(dtype) if m == 3 else None
        close(ops.run(c, x, p, bias), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weight", [("int", 4, 0, True), ("int", 8, 0, False), ("fp8", 8, 0, False), ("int", 4, 32, True)]
)
def test_ragged_shapes(weight: tuple, dtype: torch.dtype) -> None:
    for out, in_, m in ((1, 96, 1), (3, 160, 33), (40, 32, 2)):
        if weight[2] == 0:
            in_ += 3
        w = make(*weight, torch.float16, out, in_)
        x = torch.randn(m, in_, generator=torch.Generator().manual_seed(m)).to(dtype)
        close(ops.run(SMALL if m == 1 else SPLIT, x, layout.prepack(w)), x, w)


def test_many_rows_choose_their_own_kernel_and_shape() -> None:
    w = make("int", 4, 128, True, torch.float16, 24, 256)
    state = triton.layer(w)
    for lead in ((), (2, 3), (65,), (0, 2)):
        x = torch.randn(*lead, 256).half()
        y = triton.linear(x, state.packed)
        assert y.shape == (*lead, 24) and y.dtype == x.dtype
        if x.numel():
            close(y, x, w)
    x = torch.randn(512, 5).half().t()[:, 100:356]  # strides 1 and 5
    close(triton.linear(x, state.packed), x, w)
    x = torch.randn(5, 300).half()[:, 3:259]  # rows 300 apart, misaligned
    close(triton.linear(x, state.packed), x, w)


def test_split_sums_repeat_bit_by_bit_and_equal_the_kernel_entry() -> None:
    w = make("int", 4, 128, False, torch.bfloat16, 24, 768)
    p = layout.prepack(w)
    x = torch.randn(4, 768).bfloat16()
    assert torch.equal(ops.run(SPLIT, x, p), ops.run(SPLIT, x, p))
    entry = next(k for k in KERNELS if k.name == "triton")
    state = entry.prepack(w, None)
    assert torch.equal(entry.matmul(x, state, None), triton.linear(x, p))
    assert torch.equal(entry.restore(state).packed, w.packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(dtype: torch.dtype) -> None:
    for weight in WEIGHTS:
        w = make(*weight, 9, 384 if weight[2] in (96, 384) else 128)
        plain, expected = triton.dequantize(layout.prepack(w), dtype), reference.dequantize_weight(w, dtype)
        if (w.scale.dtype == torch.float32 and w.scale.shape[1] > 1) or w.kind in layout.BY_BYTES:
            assert (plain - expected).float().norm() <= 2.0**-7 * expected.float().norm()
        else:
            assert torch.equal(plain, expected), weight


@pytest.mark.parametrize("c", [SPLIT, LARGE, DEQUANTIZE], ids=["split", "weights scaled", "dequantize"])
def test_what_is_not_finite_comes_out_so(c: Config) -> None:
    """Where the oracle has NaN, from activations, scales or codes, so has every route; its neighbours stay numbers."""
    for kind, bits, group, scale_dtype in (
        ("int", 4, 32, torch.float16),
        ("int", 8, 0, torch.float32),
        ("mxfp4", 4, 32, torch.uint8),
        ("nvfp4", 4, 16, torch.float8_e4m3fn),
        ("fp8", 8, 0, torch.float32),
        ("fp8", 8, 32, torch.bfloat16),
    ):
        w = make(kind, bits, group, False, scale_dtype, 12, 96)
        bad = {torch.uint8: 255, torch.float8_e4m3fn: 127}.get(scale_dtype)  # both types' NaN
        if bad is None:
            w.scale[3, -1] = torch.nan
        else:
            w.scale.view(torch.uint8)[3, -1] = bad
        if kind == "fp8":
            w.packed.view(torch.uint8)[5, 40] = 0xFF
        state = triton.layer(w)
        assert torch.equal(triton.restore(state).scale.view(torch.uint8), w.scale.view(torch.uint8))
        for value in (torch.nan, torch.inf, 0.0):
            x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).half()
            x[-1, 7] = value
            expected, got = reference.matmul(x, w), ops.run(c, x, state.packed)
            assert torch.equal(got.isnan(), expected.isnan()), (kind, value)
            assert torch.equal(got.isinf(), expected.isinf()), (kind, value)


def test_gradients_reach_activations_and_bias() -> None:
    w = make("int", 4, 64, True, torch.float16, 24, 128)
    x = torch.randn(2, 128).half().requires_grad_()
    bias = torch.randn(24).half().requires_grad_()
    triton.linear(x, layout.prepack(w), bias).sum().backward()
    expected = reference.dequantize_weight(w, torch.float16).float().sum(0).expand(2, -1)
    assert torch.allclose(x.grad.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(bias.grad, torch.full((24,), 2.0).half())


def test_operators_have_fakes() -> None:
    p = layout.prepack(make("int", 4, 64, True, torch.float16, 24, 128))
    x = torch.randn(2, 3, 128).half()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qkit.triton_linear, (x, None, *p.parts()), test_utils=checks)
    torch.library.opcheck(torch.ops.qkit.triton_dequantize, (torch.float16, *p.parts()), test_utils=checks[0])


def test_traced_as_one_opaque_call() -> None:
    p = layout.prepack(make("int", 4, 64, False, torch.float16, 24, 128))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: triton.linear(x, p) + 1, backend=backend, dynamic=True, fullgraph=True)
    x = torch.randn(3, 128).half()
    assert torch.equal(compiled(x), triton.linear(x, p) + 1)
    assert compiled(torch.randn(70, 128).half()).shape == (70, 24)  # other rows, another kernel, the same graph
    assert len(graphs) == 1 and "triton_linear" in graphs[0].code


def test_refusals() -> None:
    w = make("int", 4, 64, False, torch.float16, 24, 128)
    p = layout.prepack(w)
    with pytest.raises(TypeError, match=r"float32, expected torch\.float16"):
        triton.linear(torch.randn(1, 128), p)
    with pytest.raises(ValueError, match=r"\(1, 64\), the weight takes 128"):
        triton.linear(torch.randn(1, 64).half(), p)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        triton.linear(torch.randn(1, 128).half(), p, torch.zeros(3))
    with pytest.raises(ValueError, match="x is on meta"):
        triton.linear(torch.empty(1, 128, device="meta").half(), p)
    with pytest.raises(ValueError, match="multiple of 32 or one scale a row, not 24 of 48"):
        layout.prepack(make("int", 4, 24, False, torch.float16, 4, 48))
    asked = dataclasses.replace(problem(w, torch.float16), device=torch.device("cuda", 0))
    assert triton.supports(asked) is None
    for change, reason in (
        ({"device": torch.device("cpu")}, "not on cpu"),
        ({"act_dtype": torch.float32}, "not torch.float32"),
        ({"activations": "int8"}, "unquantized"),
        ({"group_size": 24}, "not 24 of 128"),
    ):
        assert reason in triton.supports(dataclasses.replace(asked, **change))


def test_configurations(tmp_path) -> None:
    key = config.Key("int", 4, 128, False, torch.float16, 4096, 4096)
    assert [config.bucket(m) for m in (1, 2, 3, 8, 9, 64, 65, 10**6)] == [1, 2, 4, 8, 16, 64, 128, 8192]
    for m in (1, 2, 16, 64, 128, 256, 512, 8192):
        for amd in (False, True):
            c = config.rule(key, m, 132, amd)
            assert c.route == "dequantize" or key.padded_n % c.bn == 0
            assert c.split >= 1 and c.route == ("dequantize" if m >= 512 else c.route)
    path = config.path_of("NVIDIA H100 80GB HBM3", tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json" and config.load(path) == {}
    tuned = {key.text(): {"1": SMALL, "16": SPLIT}}
    config.save(path, "NVIDIA H100 80GB HBM3", tuned)
    assert config.load(path) == {"int4 g128 float16 4096x4096": {1: SMALL, 16: SPLIT}}
    document = json.loads(path.read_text())
    document["configs"][key.text()]["1"][0] = "fast"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="fast"):
        config.load(path)


def test_candidates_fit_and_tuning_needs_a_device() -> None:
    from qkit.kernels.triton import tune

    key = config.Key("int", 4, 128, False, torch.float16, 4096, 4096)
    for m in (1, 16, 256, 2048):
        found = tune.candidates(key, m, 132)
        assert 1 <= len(found) <= 24 and len(set(found)) == len(found)
        assert found[0] == config.rule(key, m, 132)
    with pytest.raises(ValueError, match="not on cpu"):
        tune.tune(layout.prepack(make("int", 4, 128, False, torch.float16, 8, 128)), torch.float16)


@pytest.mark.parametrize(("version", "runs"), [("3.2.0", False), ("3.10.0", True), ("3.6.0+git1", True)])
def test_older_tritons_fall_back(monkeypatch, version, runs) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    device._unusable.cache_clear()
    w = make("int", 4, 128, True, torch.float16, 32, 128)
    asked = dataclasses.replace(problem(w, torch.float16), device=torch.device("cuda", 0))
    first = next(kernel.name for kernel in KERNELS if kernel.supports(asked) is None)
    reason = device.unavailable(asked.device)
    device._unusable.cache_clear()
    assert first == ("triton" if runs else "reference") and (reason is None if runs else version in reason)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((6, 1), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_fall_back(monkeypatch, capability, runs) -> None:
    """Every Triton kernel refuses them, so that the reference serves."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    w = make("int", 8, 128, True, torch.float16, 32, 128)
    for activations in (None, "int8"):
        asked = dataclasses.replace(problem(w, torch.float16, activations), device=torch.device("cuda", 0))
        first = next(kernel.name for kernel in KERNELS if kernel.supports(asked) is None)
        assert first.startswith("triton") == runs
        if not runs:
            assert first == "reference" and "capability" in device.unavailable(asked.device)
