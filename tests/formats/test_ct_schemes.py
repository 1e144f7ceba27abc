"""W8A8, FP8, NVFP4 and MXFP4 in compressed-tensors: its own code finds the values that ours does; and the roundings."""

from __future__ import annotations

import json

import pytest
import torch
from models import make_model

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of
from qkit.kernels.weight import TABLES
from qkit.methods import METHODS, floats
from qkit.sources import open_source
from qkit.spec import preset
from qkit.spec.dtypes import dtype_name

SCHEMES = ("w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16")
FORMATS = {
    "w8a8": "int-quantized", "fp8": "float-quantized", "fp8-block": "float-quantized",
    "nvfp4a16": "nvfp4-pack-quantized", "mxfp4a16": "mxfp4-pack-quantized",
}  # fmt: skip


def weight(out: int = 96, in_: int = 256, seed: int = 0) -> torch.Tensor:
    w = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[3], w[4, :64], w[5] = 0, 0, w[5] * 1e-4
    w[6, 0] = 2
    return w.bfloat16()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_finds_the_same_values(name, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    fmt = formats.get("compressed-tensors")
    scheme = fmt.scheme_for(preset(name), dtype)
    w = weight()
    (done,) = METHODS["rtn"].quantize([w], None, [scheme])
    tensors = fmt.pack(done.weight, scheme)
    metas = fmt.out_metas((96, 256), scheme)
    assert {k: (dtype_name(t.dtype), tuple(t.shape)) for k, t in tensors.items()} == {
        k: (m.dtype, m.shape) for k, m in metas.items()
    }
    again = fmt.unpack(tensors, scheme)
    assert torch.equal(values_of(again), values_of(done.weight))
    config = QuantizationConfig.model_validate(fmt.config({"a": scheme}, ["lm_head"], {}))
    group = config.config_groups["group_0"]
    assert group.format == FORMATS[name]
    read = BaseCompressor.get_value_from_registry(group.format).decompress(dict(tensors), group)["weight"]
    # It multiplies in the scale's type, we in float32.
    assert torch.allclose(read.float(), values_of(done.weight), rtol=0 if "4" in name else 2**-8, atol=1e-9)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_folder_from_end_to_end(name, tmp_path):
    source = make_model(tmp_path / "source")
    out = qkit.convert(source, tmp_path / "out", scheme=name).out
    found = inspect(str(out), verify=True)
    assert found.problems == [] and sum(found.schemes.values()) == 14
    assert found.parameters == inspect(str(source)).parameters
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (group["input_activations"] is None) == name.endswith("a16")
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = qkit.load(source, device="cpu")(tokens).logits.float()
        logits = qkit.load(out, device="cpu")(tokens).logits.float()
    error = float((logits - expected).norm() / expected.norm())
    assert error < {"w8a8": 0.04, "fp8": 0.1, "fp8-block": 0.1}.get(name, 0.35)


def test_groups_of_every_kind_in_one_folder(tmp_path):
    """Each module under its own group's format, read back by us and by the client's rules."""
    source = make_model(tmp_path / "source")
    rules = [("*.down_proj", "w8a8"), ("*.up_proj", "fp8"), ("*.gate_proj", "nvfp4a16"), ("*.o_proj", "mxfp4a16")]
    (tmp_path / "r.yaml").write_text("".join(f"- {{modules: '{m}', scheme: {s}}}\n" for m, s in rules))
    out = qkit.convert(source, tmp_path / "out", scheme="w4a16", method="rtn", recipe=str(tmp_path / "r.yaml")).out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 5
    assert inspect(str(out), verify=True).problems == []
    with torch.inference_mode():
        qkit.load(out, device="cpu")(torch.arange(10)[None])
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    groups = QuantizationConfig.model_validate(config).config_groups.values()
    opened = open_source(str(out))
    reader = formats.reader(opened.config)
    for module, scheme in formats.quantized_modules(reader, opened).items():
        (group,) = [g for g in groups if module in g.targets]
        names = formats.local_names(reader, opened, module, scheme)
        tensors = {local: opened.read(f"{module}.{local}") for local in names}
        theirs = BaseCompressor.get_value_from_registry(group.format).decompress(tensors, group)["weight"].float()
        ours = values_of(formats.read_weight(reader, opened, module, scheme))
        assert torch.allclose(theirs, ours, rtol=2**-7, atol=1e-8), module


def test_roundings_are_the_nearest():
    w = weight(32, 128, seed=1)
    q = floats.nvfp4(w)
    table, scale = torch.tensor(TABLES["nvfp4"]), q.float_scale()
    for o in range(32):
        for i in range(0, 128, 7):
            values = table * scale[o, i // 16]
            best = float((values - w[o, i].float()).abs().min())
            assert float((values[codes_of(q)[o, i].int()] - w[o, i].float()).abs()) <= best + 1e-9
    assert 1 / q.multiplier == 1024.0  # the same for all layers of usual weights: fused ones must agree
    assert 1 / floats.nvfp4(w * 1000).multiplier < 1024
    f = floats.fp8(w, preset("fp8").stored_with("F32"))
    assert torch.equal(
        codes_of(f).view(torch.float8_e4m3fn).float(), (w.float() / f.scale).to(torch.float8_e4m3fn).float()
    )
    i = floats.narrow_int8(w, preset("w8a8").stored_with("F32"))
    assert int(codes_of(i).min()) >= 1 and bool((i.scale > 0).all())
    m = values_of(floats.mxfp4(w))
    assert float((m - w.float()).norm() / w.float().norm()) < 0.16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w8a8", "group_size": 128}, "no group size to choose"),
        ({"scheme": "fp8", "group_size": 128}, "no group size to choose"),
        ({"scheme": "w8a8", "method": "gptq"}, "gptq makes integer weights"),
        ({"scheme": "nvfp4a16", "format": "gptq"}, "gptq does not hold nvfp4"),
        ({"scheme": "nf4"}, "compressed-tensors does not hold nf4"),
        ({"scheme": "w8a8", "format": "gptq"}, "activations"),
        ({"scheme": "w8a8", "format": "awq"}, "activations|8-bit"),
    ],
)
def test_what_does_not_go_together(options, message, llama, tmp_path):
    with pytest.raises(QkitError, match=message):
        qkit.convert(llama, tmp_path / "out", dry_run=True, **options)


def test_blocks_that_do_not_divide(tmp_path):
    source = make_model(tmp_path / "source", hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(QkitError, match="blocks of 128 do not divide"):
        qkit.convert(source, tmp_path / "out", scheme="fp8-block", dry_run=True)
