"""GPTQ of 2 and 3 bits: the bytes by their definition, both ways, and from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of, weight_of
from qkit.methods import METHODS
from qkit.spec import CHANNEL, integer
from qkit.spec.dtypes import dtype_name


def stream(words: np.ndarray, bits: int, index: int) -> np.ndarray:
    """Field `index` along the last axis of a stream of bits in 32-bit words, low bits first: it may cross words."""
    unsigned = words.view(np.uint32).astype(object)
    whole = sum(unsigned[..., k] << (32 * k) for k in range(words.shape[-1]))
    return ((whole >> (bits * index)) & ((1 << bits) - 1)).astype(int)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["gptq", "gptq_v2"]), bits=st.sampled_from([2, 3]), symmetric=st.booleans(),
    size=st.sampled_from([CHANNEL, 32, 64]), rows=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_and_definition(name, bits, symmetric, size, rows, groups, seed):
    fmt = formats.get(name)
    out, in_ = 32 * rows, max(size, 32) * groups
    scheme = fmt.scheme_for(integer(bits, size, symmetric), "BF16")
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, in_), generator=g).to(torch.uint8)
    count = scheme.groups(in_)
    scale = torch.rand(out, count, generator=g).half()
    least = scheme.min_zero
    zero = None if symmetric else torch.randint(least, 1 << bits, (out, count), generator=g).to(torch.uint8)
    weight = weight_of(codes, scale, zero, bits)
    tensors = fmt.pack(weight, scheme)
    for local, meta in fmt.out_metas((out, in_), scheme).items():
        assert (dtype_name(tensors[local].dtype), tuple(tensors[local].shape)) == (meta.dtype, meta.shape)
    read = fmt.unpack(tensors, scheme)
    assert torch.equal(codes_of(read), codes) and torch.equal(values_of(read), values_of(weight))
    along = tensors["qweight"].t().contiguous().numpy()
    for i in (0, 9, 10, 11, 20, 21, 22, in_ - 1):  # of 3 bits, 10 and 21 cross words
        assert (stream(along, bits, i) == codes[:, i].numpy()).all()
    stored = stream(tensors["qzeros"].numpy(), bits, out - 1)
    expected = (1 << (bits - 1)) if zero is None else zero[out - 1].numpy()
    assert (stored == expected - (name == "gptq")).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("scheme", "bound"), [("w3a16", 0.3), ("w3a16-asym", 0.3), ("w2a16-asym", 0.7)])
def test_from_end_to_end(method, scheme, bound, tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 2, "calib_len": 64}
    more = calibration if method == "gptq" else {}
    out = qkit.convert(
        source, tmp_path / "out", format="gptq_v2", scheme=scheme, method=method, group_size=32, **more
    ).out
    found = inspect(str(out), verify=True)
    assert found.problems == [] and found.parameters == inspect(str(source)).parameters
    assert all(name.startswith(f"int{scheme[1]}") for name in found.schemes)
    settings_ = json.loads((out / "quantize_config.json").read_text())
    assert settings_["bits"] == int(scheme[1])
    entries = json.loads((out / "qkit_manifest.json").read_text())["tensors"].values()
    assert 0 < max(entry["weight_error"] for entry in entries) < bound
    with torch.no_grad():
        assert bool(torch.isfinite(qkit.load(out, device="cpu")(torch.arange(20)[None]).logits).all())


def test_rounding_is_the_nearest():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3):
        spec = integer(bits, 32, symmetric=False, scale_dtype="F16")
        (done,) = METHODS["rtn"].quantize([w], None, [spec])
        step = done.weight.scale.float().repeat_interleave(32, 1)
        inside = (values_of(done.weight) - w).abs() <= step / 2 * 1.01
        assert float(inside.double().mean()) > 0.95  # all but what the rounded zero point leaves outside


def test_only_gptq_has_them(llama, tmp_path):
    for fmt, scheme in (("compressed-tensors", "w3a16"), ("awq", "w3a16"), ("awq", "w2a16-asym")):
        with pytest.raises(QkitError, match=r"3-bit|2-bit"):
            qkit.convert(llama, tmp_path / "out", format=fmt, scheme=scheme, method="rtn", dry_run=True)


def test_mixed_widths(tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "r.yaml").write_text(
        "- {modules: '*.down_proj', scheme: w8a16}\n- {modules: '*.o_proj', scheme: w2a16}\n"
    )
    more = {"recipe": str(tmp_path / "r.yaml"), "method": "rtn", "group_size": 32}
    out = qkit.convert(source, tmp_path / "out", format="gptq", scheme="w3a16", **more).out
    assert {name.split()[0] for name in inspect(str(out)).schemes} == {"int2", "int3", "int8"}
