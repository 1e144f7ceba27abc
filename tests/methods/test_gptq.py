"""GPTQ against a column-by-column oracle in float64, its objective against rounding's, and what can go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.calibrate import statistics
from qkit.errors import QkitError
from qkit.kernels.codes import codes_of, values_of
from qkit.methods import gptq, square
from qkit.spec import integer


def case(out=24, in_=128, tokens=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_, generator=g) @ torch.randn(in_, in_, generator=g) / in_**0.5
    x *= torch.linspace(0.2, 3, in_)[torch.randperm(in_, generator=g)]
    return torch.randn(out, in_, generator=g), x.T @ x


def objective(w, q, h):
    d = (w.double() - values_of(q).double()) @ torch.linalg.cholesky(
        h.double() + 1e-9 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    )
    return float(d.square().sum())


def paper_loop(w, h, scale, zero, scheme, damp, order):
    """The paper's algorithm as printed: inverse Hessian, its Cholesky factor, updates of all columns to come."""
    out, n = w.shape
    size = n // scale.shape[1]
    h = h.double()[order][:, order]
    h = h + damp * h.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = w.double()[:, order].clone()
    codes = torch.empty(out, n)
    for j in range(n):
        g = int(order[j]) // size
        s = scale[:, g].double()
        z = float(scheme.mid) if zero is None else zero[:, g].double()
        code = ((w[:, j] / s).round() + z).clamp(0, scheme.max_code)
        error = (w[:, j] - (code - z) * s) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:][None]
        codes[:, j] = code
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.uint8)


@pytest.mark.parametrize(
    "scheme", [integer(group_size=32), integer(group_size=0), integer(8, 32), integer(4, 64, False)]
)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("in_", [128, 320])
def test_equals_the_papers_loop(scheme, act_order, in_):
    w, h = case(in_=in_)
    result = gptq.quantize(w, h, scheme, act_order=act_order, sweeps=0)
    q = result.weight
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(in_)
    expected = paper_loop(w, h, q.scale, q.zero, scheme, 0.01, order)
    # A value within float32's error of the middle between two codes may go either way, and what follows with it.
    same = (codes_of(q) == expected).all(dim=1)
    assert same.float().mean() > 0.8
    assert result.method == "gptq" and result.fallback is None
    assert result.output_error == pytest.approx(objective(w, q, h) / float(((w @ h) * w).sum()), rel=1e-3)


# Many rows: the loop is greedy, so a single row of 16 columns can lose to rounding by bad luck, their sum does not.
# Fixed examples, because that is a statement about averages.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(250, 260),
    groups=st.integers(1, 5),
    size=st.sampled_from([16, 24, 32]),
    tokens=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    sweeps=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_objective_is_at_most_rounding_on_the_same_grid(out, groups, size, tokens, bits, symmetric, sweeps, seed):
    w, h = case(out, groups * size, tokens, seed)
    scheme = integer(bits, size, symmetric)
    result = gptq.quantize(w, h, scheme, sweeps=sweeps)
    q = result.weight
    rounded = gptq._rounded(w, h, scheme, "for comparison")
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    assert objective(w, q, damped) <= objective(w, rounded.weight, damped) * 1.02
    assert result.output_error >= 0 and codes_of(q).max() <= scheme.max_code


def test_descent_never_raises_the_damped_objective():
    w, h = case(in_=192, tokens=96)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    values = [objective(w, gptq.quantize(w, h, integer(group_size=64), sweeps=k).weight, damped) for k in range(4)]
    assert values == sorted(values, reverse=True) and values[1] < values[0]


def test_scales_are_rounded_before_codes_are_chosen_and_the_sign_is_free():
    w, h = case(in_=256)
    w[:, 5] = 9.0  # the positive end must be reachable: scale negative, code 0
    q = gptq.quantize(w, h, integer(group_size=64)).weight
    assert q.scale.dtype == torch.bfloat16 and q.scale.isfinite().all() and (q.scale != 0).all()
    assert (q.scale < 0).any() and (q.scale > 0).any()
    assert gptq.quantize(w, h, integer(group_size=64, scale_dtype="F16")).weight.scale.dtype == torch.float16


def test_least_zero_point_is_respected():
    w, h = case()
    q = gptq.quantize(w.abs() + 1, h, integer(4, 32, False, min_zero=1)).weight
    assert q.zero.dtype == torch.uint8 and q.zero.min() >= 1
    assert gptq.quantize(w.abs() + 1, h, integer(4, 32, False)).weight.zero.min() == 0


def test_weights_that_share_an_input_come_out_as_by_themselves():
    a, h = case(out=8)
    b, _ = case(out=5, seed=1)
    c, _ = case(out=3, seed=2)
    schemes = [integer(group_size=32), integer(8, 32), integer(group_size=32)]
    for w, scheme, result in zip([a, b, c], schemes, gptq.quantize_all([a, b, c], h.clone(), schemes), strict=True):
        alone = gptq.quantize(w, h, scheme)
        assert torch.equal(result.weight.scale, alone.weight.scale)
        assert (codes_of(result.weight) == codes_of(alone.weight)).float().mean() > 0.99
        assert result.output_error == pytest.approx(alone.output_error, rel=1e-2)


def test_singular_hessian_climbs_the_ladder():
    w, h = case(in_=128, tokens=16)  # rank 16
    result = gptq.quantize(w, h, integer(group_size=32), damp=0.0)
    assert result.fallback is None and result.method == "gptq"
    rounded = gptq._joined([gptq._rounded(w, h, integer(group_size=32), "for comparison")])
    assert result.output_error < rounded.output_error


def test_indefinite_hessian_falls_back_and_says_so():
    w, h = case()
    h = h - 20 * h.diagonal().mean() * torch.ones_like(h).fill_diagonal_(0)
    result = gptq.quantize(w, h, integer(group_size=32))
    assert result.method == "rtn" and "not positive definite" in result.fallback
    assert torch.isfinite(values_of(result.weight)).all()


def test_no_token_falls_back_and_says_so():
    w, h = case()
    result = gptq.quantize(w, torch.zeros_like(h), integer(group_size=32))
    assert result.fallback == gptq.UNREACHED and result.method == "rtn"
    assert (values_of(result.weight) - w).abs().max() < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns(symmetric):
    w, h = case(in_=128)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[3, 40, 41]] = True
    dead[64:96] = True  # a whole group
    h[dead] = 0
    h[:, dead] = 0
    w[:, 3] = 1e4  # would ruin the scale of its group if it counted
    scheme = integer(group_size=32, symmetric=symmetric)
    q = gptq.quantize(w, h, scheme).weight
    values = values_of(q)
    assert torch.isfinite(values).all()
    assert (values[:, 64:96] - w[:, 64:96]).abs().max() < 0.6  # rounded to the nearest
    alive = gptq.quantize(w[:, 96:], h[96:, 96:], scheme).weight
    assert codes_of(alive).shape == (24, 32)


def test_degenerate_weights():
    _, h = case(in_=64)
    zero = gptq.quantize(torch.zeros(4, 64), h, integer(group_size=32))
    assert zero.output_error == 0 and not values_of(zero.weight).any()
    constant = gptq.quantize(torch.full((4, 64), -0.25), h, integer(group_size=32, symmetric=False))
    assert torch.allclose(values_of(constant.weight), torch.full((4, 64), -0.25), rtol=0.01)
    tiny = gptq.quantize(torch.full((4, 64), 1e-12), h, integer(group_size=32, scale_dtype="F16"))
    assert torch.isfinite(values_of(tiny.weight)).all() and (tiny.weight.scale != 0).all()
    with pytest.raises(QkitError, match="does not fit F16"):
        gptq.quantize(torch.full((4, 64), 1e9), h, integer(group_size=32, scale_dtype="F16"))


def test_bad_input():
    w, h = case()
    with pytest.raises(QkitError, match="weight contains NaN"):
        gptq.quantize(w.index_fill(0, torch.tensor([1]), float("nan")), h, integer(group_size=32))
    with pytest.raises(QkitError, match="statistics contain NaN"):
        gptq.quantize(w, h.index_fill(0, torch.tensor([1]), float("inf")), integer(group_size=32))
    with pytest.raises(ValueError, match="do not match"):
        gptq.quantize(w, h[:64, :64], integer(group_size=32))
    with pytest.raises(ValueError, match="does not divide"):
        gptq.quantize(w, h, integer(group_size=48))


@pytest.mark.parametrize("n", [7, 640, 1100])
def test_a_hessian_does_not_depend_on_the_batches(n, monkeypatch):
    monkeypatch.setattr(statistics, "slab_tokens", lambda n: 64)
    x = torch.randn(5, 50, n).bfloat16()
    found = []
    for batch in (1, 2, 5):
        h = statistics.Hessian(n, "cpu")
        for part in x.split(batch):
            h.add(part)
        assert h.tokens == 250
        found.append(h.result())
    flat = x.double().reshape(-1, n)
    torch.testing.assert_close(found[0], (flat.T @ flat).float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], found[0].T) and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("n", [1, 37, 512, 1300])
def test_a_square_is_factored_in_place(n):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n + 3, n, generator=g)
    h, added, order = x.T @ x, torch.rand(n, generator=g), torch.randperm(n, generator=g)
    h = torch.triu(h) + torch.triu(h, 1).T
    expected = h[order][:, order]
    held = h.data_ptr()
    h = square.permute(h, order)
    assert torch.equal(h, expected) and h.data_ptr() == held
    diagonal = square.factor(h, added)
    assert h.data_ptr() == held and torch.equal(diagonal, expected.diagonal())
    assert torch.equal(h.triu(1), expected.triu(1))
    lower = torch.linalg.cholesky(expected.double() + torch.diag(added).double())
    torch.testing.assert_close(h.tril().double(), lower, rtol=1e-3, atol=1e-3)


def test_a_square_that_has_no_factor_stays_as_it_was():
    h = torch.eye(1300)
    h[1200, 1100] = h[1100, 1200] = 2.0
    kept = h.clone()
    assert square.factor(h, torch.zeros(1300)) is None and torch.equal(h, kept)


def test_rows_in_slabs_give_what_all_rows_give(monkeypatch):
    weights = [case(out=n, seed=n)[0] for n in (40, 8, 300)]
    h = case()[1]
    schemes = [integer(group_size=32), integer(8, 32), integer(group_size=32)]
    whole = gptq.quantize_all(weights, h.clone(), schemes)
    monkeypatch.setattr(gptq, "_SLAB", 1)
    monkeypatch.setattr(gptq, "_LEAST_ROWS", 32)
    for one, other in zip(whole, gptq.quantize_all(weights, h.clone(), schemes), strict=True):
        assert torch.equal(one.weight.scale, other.weight.scale)
        assert (codes_of(one.weight) == codes_of(other.weight)).float().mean() > 0.99
        assert one.output_error == pytest.approx(other.output_error, rel=1e-2)
