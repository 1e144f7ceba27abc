"""GPTQ's inner loops: every instruction set gives the torch reference's bits; the search finds the least loss."""

from __future__ import annotations

import pytest
import torch

from qkit import kernels
from qkit.kernels import gptq
from qkit.kernels.cpu import lib

# The levels above these differ in the matmul only.
ISAS = tuple(isa for isa in lib.isas() if isa not in ("avxvnni", "avx512vnni", "avx512bf16", "amx", "dotprod", "i8mm"))
needs_library = pytest.mark.skipif(not ISAS, reason="the CPU library was not built")
MULTIPLES = tuple(m for k in (0.6, 0.75, 0.9, 1.0, 1.05) for m in (k, -k))


def columns(n: int, out: int, asymmetric: bool = False):
    g = torch.Generator().manual_seed(n * 1000 + out)
    weight = torch.randn(n, out, generator=g)
    scale = (torch.rand(n, out, generator=g) * 0.3 + 0.05) * torch.where(torch.rand(n, out, generator=g) < 0.5, -1, 1)
    zero = torch.randint(0, 16, (n, out), generator=g).float() if asymmetric else None
    a = torch.randn(3 * n + 1, n, generator=g)
    h = (a.T @ a).contiguous()
    return weight, scale, zero, h


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (128, 48), (77, 16), (128, 1000)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_columns_equal_the_reference(isa, shape, asymmetric, monkeypatch):
    weight, scale, zero, h = columns(*shape, asymmetric)
    target = weight + 0.01 * weight.flip(0)
    lower = torch.tril(h / h.diagonal(), -1) * 0.1
    wide = torch.zeros(shape[0], shape[0] + 3)  # rows of a larger matrix, as the blocks of the factor and of H are
    wide[:, : shape[0]] = lower
    got, expected = ((torch.empty_like(weight), torch.empty_like(weight)) for _ in range(2))
    lib.gptq_feedback(target, weight, wide[:, : shape[0]], scale, zero, 8.0, 15.0, *got, isa)
    start = (got[0] + 1).clamp_(max=15)
    stepped = start.clone()
    steps = lib.gptq_descend(h @ got[1], h, h.diagonal().contiguous(), scale, stepped, 15.0, isa)
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    gptq.feedback(target, weight, lower, scale, zero, 8.0, 15.0, *expected)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[0].min() >= 0 and got[0].max() <= 15
    moved = start.clone()
    assert torch.equal(steps, gptq.descend(h @ got[1], h, h.diagonal(), scale, moved, 15.0))
    assert torch.equal(stepped, moved)


def loss(w, scale, zero, bits, cost):
    q = kernels.reference.quantize(w, scale, zero, bits)
    return ((kernels.reference.dequantize(q, scale, zero, bits, torch.float32) - w.float()) ** 2 * cost).sum().double()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("symmetric", "min_zero"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize(("bits", "shape", "groups"), [(4, (7, 96), 3), (8, (3, 40), 1), (4, (16, 256), 2)])
def test_search(isa, dtype, symmetric, min_zero, bits, shape, groups, monkeypatch):
    g = torch.Generator().manual_seed(3)
    w = torch.randn(*shape, generator=g)
    w[0] = 0
    w[1] = w[1].abs()
    cost = torch.rand(shape[1], generator=g) + 1e-3
    multiples = MULTIPLES if symmetric else tuple(m for m in MULTIPLES if m > 0)
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    scale, zero = lib.gptq_search(w, cost, bits, groups, symmetric, stored, min_zero, multiples, isa)
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    other, other_zero = gptq.search(w, cost, bits, groups, symmetric, dtype, min_zero, multiples)
    # Sums are taken in another order, so a near tie may fall either way: same scales nearly everywhere, same loss.
    assert (scale == other).float().mean() > 0.9
    mine, theirs = loss(w, scale, zero, bits, cost), loss(w, other, other_zero, bits, cost)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    plain = kernels.quantize_rtn(w, bits, shape[1] // groups, symmetric, dtype, min_zero)
    assert mine <= loss(w, plain[1], plain[2], bits, cost) * (1 + 1e-6) or not symmetric
    assert scale.dtype == stored and bool((scale[0] == 1).all())
    assert zero is None or int(zero.min()) >= min_zero


@pytest.mark.parametrize("native", [True, False])
def test_search_refuses_what_it_cannot_store(native, monkeypatch):
    if not native:
        monkeypatch.setenv("QKIT_REFERENCE", "1")
    cost = torch.ones(32)
    with pytest.raises(kernels.NonFiniteError):
        gptq.search(torch.full((2, 32), float("nan")), cost, 4, 1, True, "BF16", 0, MULTIPLES)
    with pytest.raises(kernels.ScaleOverflowError):
        gptq.search(torch.full((2, 32), 1e9), cost, 4, 1, True, "F16", 0, MULTIPLES)
    scale, _ = gptq.search(torch.full((2, 32), 1e-30), cost, 4, 1, True, "F16", 0, MULTIPLES)
    assert bool((scale == 1).all())


def test_misuse_names_the_values():
    weight, scale, _, h = columns(4, 8)
    with pytest.raises(ValueError, match=r"\(4, 8\)"):
        gptq.feedback(weight, weight, h[:3, :3], scale, None, 8.0, 15.0, weight, weight)
    with pytest.raises(TypeError, match="float64"):
        gptq.feedback(weight.double(), weight, h, scale, None, 8.0, 15.0, weight, weight)
    with pytest.raises(ValueError, match="groups"):
        gptq.search(weight, torch.ones(7), 4, 1, True, "BF16", 0, MULTIPLES)
