"""AWQ's bytes by their definition, both ways, and what the format refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model
from weights import random_weight, same

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of
from qkit.spec import CHANNEL, integer
from qkit.spec.dtypes import dtype_name

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, awq/utils/packing_utils.py


@settings(max_examples=40, deadline=None)
@given(
    symmetric=st.booleans(), size=st.sampled_from([CHANNEL, 32, 64, 128]), words=st.integers(1, 9),
    groups=st.integers(1, 3), ragged=st.integers(1, 70), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_and_definition(symmetric, size, words, groups, ragged, seed):
    fmt = formats.get("awq")
    out, in_ = 8 * words, size * groups if size else ragged
    scheme = fmt.scheme_for(integer(4, size, symmetric), "BF16")
    q = random_weight(out, in_, scheme, seed)
    tensors = fmt.pack(q)
    for local, meta in fmt.out_metas((out, in_), scheme).items():
        assert (dtype_name(tensors[local].dtype), tuple(tensors[local].shape)) == (meta.dtype, meta.shape)
        assert tensors[local].is_contiguous()
    assert same(fmt.unpack(tensors, scheme), q)
    for name, codes in (("qweight", codes_of(q)), ("qzeros", q.zero)):
        unsigned = tensors[name].numpy().view(np.uint32)
        for i, column in enumerate(ORDER):
            nibble = (unsigned >> np.uint32(4 * i)) & np.uint32(15)
            expected = 8 if codes is None else codes.t()[:, column::8].numpy()
            assert (nibble == expected).all()


def test_a_folder_from_end_to_end(tmp_path):
    """Written, inspected, loaded: the same logits as the same codes in compressed-tensors."""
    source = make_model(tmp_path / "source")
    common = {"scheme": "w4a16-asym", "method": "rtn", "group_size": 32}
    qkit.convert(source, tmp_path / "awq", format="awq", **common)
    qkit.convert(source, tmp_path / "gptq2", format="gptq_v2", **common)
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    assert inspect(str(tmp_path / "awq"), verify=True).problems == []
    assert inspect(str(tmp_path / "awq")).schemes == {"int4 asymmetric g32": 14}
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        a, b = (qkit.load(tmp_path / name, device="cpu")(tokens).logits for name in ("awq", "gptq2"))
    assert torch.equal(a, b)


def test_the_default_scheme_and_a_symmetric_one(llama, tmp_path):
    qkit.convert(llama, tmp_path / "a", format="awq", method="rtn")
    assert inspect(str(tmp_path / "a")).schemes == {"int4 asymmetric g128": 14}
    qkit.convert(llama, tmp_path / "b", format="awq", method="rtn", scheme="w4a16", skip=("*.layers.0.*",))
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in config["modules_to_not_convert"]
    assert "lm_head" not in config["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"scheme": "w8a16"}, "no 8-bit", "gptq"),
        ({"group_size": 16}, "no group size 16", "32, 64, 128"),
        ({"scheme": "q4_0"}, "does not hold q4_0", "w4a16"),
        ({"method": "imatrix"}, "block types", "method"),
        ({"group_size": 96}, "no group size 96|does not divide", "32"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_the_plan(options, message, hint, llama, tmp_path):
    with pytest.raises(QkitError, match=message) as caught:
        qkit.convert(llama, tmp_path / "out", format="awq", dry_run=True, **options)
    assert hint in caught.value.hint


def test_group_sizes_cannot_be_mixed(llama, tmp_path):
    (tmp_path / "r.yaml").write_text("- {modules: '*.down_proj', scheme: w4a16-asym, group_size: 32}\n")
    with pytest.raises(QkitError, match="one group size"):
        qkit.convert(llama, tmp_path / "out", format="awq", dry_run=True, recipe=str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "config",
    [{"version": "gemv"}, {"bits": 3}, {"group_size": 0}, {"group_size": "x"}, {"modules_to_not_convert": "a"}],
)
def test_folders_that_are_not_read(config):
    given = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", **config}
    with pytest.raises(QkitError):
        formats.reader({"quantization_config": given})


def test_autoawq_names_of_its_settings():
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    found = formats.reader({"quantization_config": old})
    assert found is not None and found.scheme("a").group_size == 64


def test_damaged_tensors_are_named():
    fmt = formats.get("awq")
    scheme = fmt.scheme_for(integer(4, 32, symmetric=False), "BF16")
    good = fmt.pack(random_weight(32, 64, scheme))
    for local in ("qzeros", "scales"):
        with pytest.raises(QkitError, match=local):
            fmt.unpack({**good, local: good[local][:-1]}, scheme)
    assert values_of(fmt.unpack(good, scheme)).shape == (32, 64)
    with pytest.raises(QkitError, match="zero points"):
        fmt.unpack(good, integer(4, 32, True, "F16"))
