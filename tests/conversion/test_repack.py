"""Quantized checkpoints as sources: repacked code for code where the grids agree, dequantized where they do not."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of
from qkit.sources import open_source


def weights(folder):
    """Module -> weight of a folder that is quantized."""
    source = open_source(str(folder))
    reader = formats.reader(source.config)
    schemes = formats.quantized_modules(reader, source)
    return {module: formats.read_weight(reader, source, module, scheme) for module, scheme in schemes.items()}


def same_codes(a, b):
    """Not one code and not one zero point is another; nor a scale, whatever type holds it."""
    for module, weight in a.items():
        other = b[module]
        assert torch.equal(codes_of(weight), codes_of(other)), module
        zero, expected = (torch.full_like(w.scale, 8).byte() if w.zero is None else w.zero for w in (other, weight))
        assert torch.equal(zero, expected), module
        assert torch.equal(weight.scale.float(), other.scale.float()), module


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), itertools.permutations(["compressed-tensors", "gptq", "gptq_v2", "awq"], 2)
)
def test_repacked_without_loss(first, second, asymmetric, tmp_path):
    source = make_model(tmp_path / "source")
    scheme = "w4a16-asym" if asymmetric else "w4a16"
    one = qkit.convert(source, tmp_path / "one", format=first, scheme=scheme, method="rtn", group_size=32).out
    two = qkit.convert(one, tmp_path / "two", format=second)
    assert "14 weights are repacked" in " ".join(two.plan.notes) and two.plan.method.name == "rtn"
    same_codes(weights(one), weights(two.out))
    assert inspect(str(two.out), verify=True).problems == []
    entries = json.loads((two.out / "qkit_manifest.json").read_text())["tensors"]
    assert {entry["method"] for entry in entries.values()} == {"repacked"}
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [qkit.load(folder, device="cpu")(tokens).logits for folder in (one, two.out)]
    assert torch.equal(*logits)


def test_what_the_source_keeps_and_mixes_stays(tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "r.yaml").write_text("- {modules: '*.down_proj', scheme: w8a16, group_size: 64}\n")
    more = {"recipe": str(tmp_path / "r.yaml"), "skip": ("*layers.0.self_attn.*",)}
    one = qkit.convert(source, tmp_path / "one", scheme="w4a16", method="rtn", **more).out
    two = qkit.convert(one, tmp_path / "two", format="gptq").out
    assert inspect(str(one)).schemes == inspect(str(two)).schemes
    same_codes(weights(one), weights(two))


@pytest.mark.parametrize("fmt", ["bnb", "compressed-tensors"])
def test_other_grids_are_dequantized_and_it_is_said(fmt, tmp_path):
    source = make_model(tmp_path / "source")
    scheme = "nf4" if fmt == "bnb" else "fp8"
    one = qkit.convert(source, tmp_path / "one", format=fmt, scheme=scheme, method="rtn").out
    two = qkit.convert(one, tmp_path / "two", scheme="w8a16", method="rtn")
    assert "14 weights that are quantized already are dequantized" in " ".join(two.plan.notes)
    stored, again = weights(one), weights(two.out)
    for module, weight in stored.items():
        values = values_of(weight)
        assert float((values_of(again[module]) - values).norm() / values.norm()) < 0.01


def test_to_gguf_and_back_again(tmp_path):
    source = make_model(tmp_path / "source")
    one = qkit.convert(source, tmp_path / "one", format="awq", method="rtn", group_size=32).out
    two = qkit.convert(one, tmp_path / "two", format="gguf", scheme="q8_0").out
    expected = weights(one)["model.layers.1.mlp.up_proj"]
    found = open_source(str(two)).read("model.layers.1.mlp.up_proj.weight").float()
    assert float((found - values_of(expected)).norm() / found.norm()) < 0.01


def test_calibrated_from_a_quantized_source(tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    one = qkit.convert(source, tmp_path / "one", scheme="w8a16", method="rtn").out
    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 2, "calib_len": 64}
    two = qkit.convert(one, tmp_path / "two", scheme="w4a16", group_size=32, **calibration)
    assert two.plan.method.name == "gptq" and inspect(str(two.out)).schemes == {"int4 symmetric g32": 14}


def test_refusals(llama, tmp_path):
    eight = qkit.convert(llama, tmp_path / "eight", scheme="w8a16", method="rtn").out
    with pytest.raises(QkitError, match="AWQ has no 8-bit"):
        qkit.convert(eight, tmp_path / "no", format="awq", dry_run=True)
    two = qkit.convert(llama, tmp_path / "v2", format="gptq_v2", scheme="w4a16-asym", method="rtn", group_size=32).out
    (file,) = two.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.qzeros"][0, 0] = 0
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(QkitError, match=r"q_proj.weight: it has a zero point of 0.*\n.*gptq_v2"):
        qkit.convert(two, tmp_path / "no", format="gptq")
    config = json.loads((two / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "aqlm"
    (two / "config.json").write_text(json.dumps(config))
    with pytest.raises(QkitError, match="'aqlm' is not supported"):
        qkit.convert(two, tmp_path / "no", dry_run=True)
