"""Bytes on disk: exact, both ways, against independent oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import random_weight, same

from qkit import formats
from qkit.errors import QkitError
from qkit.kernels.codes import codes_of, values_of, weight_of
from qkit.runtime.linear import quant_linear
from qkit.spec import CHANNEL, integer
from qkit.spec.dtypes import dtype_name


def numpy_field(words: torch.Tensor, bits: int, index: int) -> np.ndarray:
    """Field `index` along the last axis of int32 words, low bits first."""
    unsigned = words.numpy().view(np.uint32)
    return (unsigned[..., index * bits // 32] >> np.uint32(index * bits % 32)) & np.uint32((1 << bits) - 1)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["compressed-tensors", "gptq", "gptq_v2"]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([CHANNEL, 16, 32, 64, 128]),
    out=st.integers(1, 70),
    groups=st.integers(1, 3),
    ragged=st.integers(1, 70),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    seed=st.integers(0, 99),
)
def test_round_trip(name, bits, symmetric, group_size, out, groups, ragged, dtype, seed):
    fmt = formats.get(name)
    in_ = ragged if group_size == CHANNEL else group_size * groups
    if name != "compressed-tensors":
        out, in_ = -(-out // 32) * 32, -(-in_ // max(group_size, 32)) * max(group_size, 32)
    scheme = fmt.scheme_for(integer(bits, group_size, symmetric), dtype)
    assert fmt.check((out, in_), scheme) is None
    q = random_weight(out, in_, scheme, seed)
    before = weight_of(codes_of(q), q.scale.clone(), None if q.zero is None else q.zero.clone(), q.bits)
    tensors = fmt.pack(q)
    metas = fmt.out_metas((out, in_), scheme)
    assert list(tensors) == list(metas)
    for local, meta in metas.items():
        assert (dtype_name(tensors[local].dtype), tuple(tensors[local].shape)) == (meta.dtype, meta.shape)
        assert tensors[local].is_contiguous()
    assert same(fmt.unpack(tensors, scheme), q)
    assert same(before, q)  # inputs are not modified


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("out", "in_", "group_size"), [(3, 5, CHANNEL), (7, 123, CHANNEL), (33, 96, 32), (64, 128, 128)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_package_reads_and_writes_the_same_bytes(bits, out, in_, group_size, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig

    fmt = formats.get("compressed-tensors")
    scheme = fmt.scheme_for(integer(bits, group_size, symmetric), "F32")
    q = random_weight(out, in_, scheme)
    tensors = fmt.pack(q)
    signed = (codes_of(q).int() - scheme.mid).to(torch.int8)
    assert torch.equal(pack_to_int32(signed, bits), tensors["weight_packed"])
    if q.zero is not None:
        signed = (q.zero.int() - scheme.mid).to(torch.int8)
        assert torch.equal(pack_to_int32(signed, bits, packed_dim=0), tensors["weight_zero_point"])

    config = QuantizationConfig.model_validate(fmt.config({"a": scheme}, ["lm_head"], {}))
    read = PackedQuantizationCompressor.decompress(tensors, config.config_groups["group_0"])
    assert torch.equal(read["weight"], values_of(q))


@pytest.mark.parametrize(("bits", "v1", "v2"), [(4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)])
def test_gptq_symmetric_zero_words(bits, v1, v2):
    for name, word in (("gptq", v1), ("gptq_v2", v2)):
        fmt = formats.get(name)
        scheme = fmt.scheme_for(integer(bits, 32), "BF16")
        words = fmt.pack(random_weight(64, 64, scheme))["qzeros"].numpy().view(np.uint32)
        assert (words == word).all()


@pytest.mark.parametrize(("bits", "one"), [(4, 0x11111111), (8, 0x01010101)])
def test_gptq_v1_differs_from_v2_by_one_in_every_zero(bits, one):
    v1, v2 = formats.get("gptq"), formats.get("gptq_v2")
    q = random_weight(64, 96, v1.scheme_for(integer(bits, 32, symmetric=False), "BF16"))
    a, b = v1.pack(q), v2.pack(q)
    assert torch.equal(a["qzeros"] + one, b["qzeros"])
    assert all(torch.equal(a[k], b[k]) for k in ("qweight", "scales", "g_idx"))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_layout_by_its_definition(bits):
    fmt = formats.get("gptq_v2")
    q = random_weight(32, 64, fmt.scheme_for(integer(bits, 32, symmetric=False), "BF16"))
    tensors = fmt.pack(q)
    for i in range(64):
        assert (numpy_field(tensors["qweight"].t().contiguous(), bits, i) == codes_of(q)[:, i].numpy()).all()
    for o in range(32):
        assert (numpy_field(tensors["qzeros"], bits, o) == q.zero[o].numpy()).all()
    assert torch.equal(tensors["scales"], q.scale.t())
    assert tensors["g_idx"].tolist() == [i // 32 for i in range(64)]


def test_gptq_v1_reads_zero_of_zero_as_gptqmodel_writes_it():
    """Others subtract from whole words: the borrow reaches the next field, and adding takes it back."""
    v1, v2 = formats.get("gptq"), formats.get("gptq_v2")
    scheme = v2.scheme_for(integer(4, 32, symmetric=False), "BF16")
    q = random_weight(32, 32, scheme)
    q.zero[::3] = 0
    tensors = dict(v2.pack(q))
    tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    assert same(v1.unpack(tensors, scheme), q)


def test_gptq_v1_refuses_to_write_a_zero_of_zero():
    v2 = formats.get("gptq_v2")
    q = random_weight(32, 32, v2.scheme_for(integer(4, 32, symmetric=False), "BF16"))
    q.zero[0, 0] = 0
    with pytest.raises(ValueError, match="zero point of 0"):
        formats.get("gptq").pack(q)


@pytest.mark.parametrize(("written", "read"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_mislabelled_gptq_version_is_refused(written, read):
    scheme = formats.get(written).scheme_for(integer(4, 32), "BF16")
    tensors = formats.get(written).pack(random_weight(32, 32, scheme))
    with pytest.raises(QkitError, match="zero points"):
        formats.get(read).unpack(tensors, scheme)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order(name, symmetric):
    """Groups that are not contiguous: the values of each input, by its group's scale; and the same bytes again."""
    fmt = formats.get(name)
    scheme = fmt.scheme_for(integer(4, 32, symmetric), "BF16")
    q = random_weight(32, 96, scheme)
    local = "weight_g_idx" if name == "compressed-tensors" else "g_idx"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    g_idx = torch.empty(96, dtype=torch.int32)
    g_idx[order] = torch.arange(96, dtype=torch.int32) // 32
    tensors = {**fmt.pack(q), local: g_idx}
    read = fmt.unpack(tensors, scheme)
    zero = torch.full_like(q.scale, 8) if q.zero is None else q.zero
    group = g_idx.long()
    expected = (codes_of(q).float() - zero.float()[:, group]) * q.scale.float()[:, group]
    assert torch.equal(values_of(read), expected)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    layer = quant_linear(read)
    assert torch.allclose(layer(x), x @ expected.T, atol=1e-3)
    assert torch.equal(layer.dequantize(), expected)
    if name != "compressed-tensors":
        again = fmt.pack(layer.quantized())
        assert all(torch.equal(again[k], tensors[k]) for k in again)
    with pytest.raises(QkitError, match="g_idx"):
        fmt.unpack({**tensors, local: torch.zeros(96, dtype=torch.int32)}, scheme)


def test_a_trivial_g_idx_may_be_left_out():
    fmt = formats.get("gptq")
    scheme = fmt.scheme_for(integer(4, 32), "BF16")
    tensors = dict(fmt.pack(random_weight(32, 64, scheme)))
    del tensors["g_idx"]
    assert fmt.unpack(tensors, scheme).order is None


def test_old_compressed_tensors_zero_points_are_plain_int8():
    fmt = formats.get("compressed-tensors")
    scheme = fmt.scheme_for(integer(4, 32, symmetric=False), "BF16")
    q = random_weight(5, 64, scheme)
    tensors = {**fmt.pack(q), "weight_zero_point": (q.zero.int() - 8).to(torch.int8)}
    assert same(fmt.unpack(tensors, scheme), q)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("damage", ["dtype", "shape"])
def test_damaged_tensors_are_named(name, damage):
    fmt = formats.get(name)
    scheme = fmt.scheme_for(integer(4, 32, symmetric=False), "BF16")
    good = fmt.pack(random_weight(32, 64, scheme))
    for local in good:
        if local in ("weight_shape", "qweight"):  # what the others are measured against
            continue
        bad = good[local].to(torch.int64) if damage == "dtype" else good[local][:-1]
        with pytest.raises(QkitError, match=local):
            fmt.unpack({**good, local: bad}, scheme)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 64)])
def test_gptq_needs_both_sides_divisible_by_32(shape):
    scheme = integer(4, 16)
    assert "32" in str(formats.get("gptq").check(shape, scheme))
    assert formats.get("compressed-tensors").check(shape, scheme) is None


def test_what_formats_dictate():
    asymmetric = integer(4, 128, symmetric=False)
    assert formats.get("gptq").scheme_for(asymmetric, "BF16").min_zero == 1
    assert formats.get("gptq_v2").scheme_for(asymmetric, "BF16").min_zero == 0
    assert formats.get("gptq").scheme_for(asymmetric, "BF16").scale_dtype == "F16"
    assert formats.get("compressed-tensors").scheme_for(asymmetric, "F16").scale_dtype == "F16"
    with pytest.raises(QkitError, match="group size 48"):
        formats.get("gptq").scheme_for(integer(4, 48), "BF16")
    with pytest.raises(QkitError, match="int4"):
        formats.get("safetensors").scheme_for(asymmetric, "BF16")
    with pytest.raises(QkitError) as caught:
        formats.get("exl2")
    assert "compressed-tensors, gptq, gptq_v2, awq, bnb, gguf, mxfp4, safetensors" in str(caught.value)
