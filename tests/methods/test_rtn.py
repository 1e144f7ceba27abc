"""Round to nearest: the nearest code everywhere, the error it reports, and a clip search that never hurts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.kernels.codes import codes_of, values_of
from qkit.methods import rtn
from qkit.spec import CHANNEL, LayerSpec, integer

SCHEMES = [
    integer(group_size=32),
    integer(group_size=32, symmetric=False),
    integer(group_size=64, symmetric=False, scale_dtype="F16", min_zero=1),
    integer(bits=8, group_size=16, scale_dtype="F32"),
    integer(bits=8, group_size=CHANNEL, symmetric=False),
    integer(group_size=CHANNEL),
]


def relative_error(w: torch.Tensor, q: torch.Tensor) -> float:
    return float((w.double() - q.double()).norm() / w.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=LayerSpec.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_code_is_the_nearest(scheme: LayerSpec, dtype: torch.dtype) -> None:
    w = (torch.randn(7, 128) * 0.05).to(dtype)
    q, error = rtn.quantize_with_error(w, scheme)
    assert q.spec == scheme.stored_with(scheme.scale_dtype, min_zero=0) and torch.isfinite(q.scale).all()
    groups = scheme.groups(128)
    zero = torch.full(q.scale.shape, scheme.mid) if q.zero is None else q.zero
    assert scheme.symmetric or int(zero.min()) >= scheme.min_zero
    # Every grid point against the weight, in float64: none is nearer than the one chosen.
    points = torch.arange(scheme.max_code + 1).double() - zero.double().unsqueeze(-1)
    points = points * q.scale.double().unsqueeze(-1)  # [out, groups, codes]
    grouped = w.float().double().view(7, groups, -1, 1)
    distance = (grouped - points.unsqueeze(2)).abs()
    chosen = distance.gather(-1, codes_of(q).long().view(7, groups, -1, 1)).squeeze(-1)
    slack = 1e-6 * points.abs().amax()
    assert bool((chosen <= distance.amin(-1) + slack).all())
    assert error == pytest.approx(relative_error(w, values_of(q)), rel=1e-5)
    assert torch.equal(rtn.quantize(w, scheme).packed, q.packed)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SCHEMES),
    st.sampled_from(["normal", "heavy", "skewed", "sparse", "tiny"]),
)
def test_clip_search_never_hurts_any_group(seed: int, scheme: LayerSpec, shape: str) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 128, generator=g)
    if shape == "heavy":
        w = w.pow(5)
    elif shape == "skewed":
        w = w.exp() - 1
    elif shape == "sparse":
        w = w * (torch.rand(5, 128, generator=g) < 0.1)
    elif shape == "tiny":
        w = w * 1e-6
    plain, plain_error = rtn.quantize_with_error(w, scheme)
    best, best_error = rtn.quantize_with_error(w, scheme, clip_search=True)

    def per_group(q: torch.Tensor) -> torch.Tensor:
        return (q.double() - w.double()).square().view(5, scheme.groups(128), -1).sum(-1)

    before, after = per_group(values_of(plain)), per_group(values_of(best))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert best_error <= plain_error * (1 + 1e-6)
    assert best_error == pytest.approx(relative_error(w, values_of(best)), rel=1e-5, abs=1e-9)


def test_clip_search_helps_a_gaussian() -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    scheme = integer(group_size=128)
    assert rtn.quantize_with_error(w, scheme, True)[1] < 0.96 * rtn.quantize_with_error(w, scheme)[1]


def test_both_back_ends_search_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(12, 256).bfloat16()
    for scheme in SCHEMES:
        native, native_error = rtn.quantize_with_error(w, scheme, True)
        with monkeypatch.context() as patch:
            patch.setenv("QKIT_REFERENCE", "1")
            other, other_error = rtn.quantize_with_error(w, scheme, True)
        assert torch.equal(codes_of(native), codes_of(other)) and torch.equal(native.scale, other.scale)
        assert native_error == other_error


def test_zero_weight() -> None:
    for scheme in SCHEMES:
        q, error = rtn.quantize_with_error(torch.zeros(4, 128), scheme, clip_search=True)
        assert error == 0.0 and not values_of(q).any()


def test_the_input_is_not_modified() -> None:
    w = torch.randn(4, 128)
    kept = w.clone()
    rtn.quantize(w, SCHEMES[0], clip_search=True)
    assert torch.equal(w, kept)


@pytest.mark.parametrize("clip", [False, True])
def test_bad_weights(clip: bool) -> None:
    w = torch.randn(4, 128)
    for poison, word in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        w[2, 5] = poison
        with pytest.raises(rtn.NonFiniteWeight, match=f"contains {word}"):
            rtn.quantize(w, SCHEMES[0], clip)
    w[2, 5] = 1e7
    with pytest.raises(QkitError, match="F16") as caught:
        rtn.quantize(w, integer(group_size=32, scale_dtype="F16"), clip)
    assert not isinstance(caught.value, rtn.NonFiniteWeight)
    with pytest.raises(ValueError, match="does not divide"):
        rtn.quantize(w, integer(group_size=48), clip)
