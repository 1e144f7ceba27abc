"""Fused experts through convert, load and from_pretrained; gpt-oss' MXFP4 as a source."""

from __future__ import annotations

import json

import pytest
import torch
from models import FUSED, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers import auto

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of
from qkit.runtime import QuantLinear
from qkit.runtime.transformers import register_transformers
from qkit.sources.folder import FolderSource
from qkit.sources.sliced import sliced

TOKENS = torch.arange(3, 51).view(2, 24)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits.float()


def difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    register_transformers()


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("family", [*FUSED, "qwen3_moe", "mixtral"])
def test_converted_loaded_and_in_transformers(family, fmt, tmp_path, hook):
    source = make_model(tmp_path / "source", family, save_original_format=False)
    result = qkit.convert(source, tmp_path / "out", format=fmt, scheme="w8a16", method="rtn", group_size=32)
    experts = {name for name in result.plan.schemes if ".experts." in name}
    assert len(experts) == 2 * 4 * 3 and "are stored one by one" in " ".join(result.plan.notes)
    assert inspect(str(result.out), verify=True).problems == []
    model = qkit.load(result.out, device="cpu")
    assert all(isinstance(model.get_submodule(name.removesuffix(".weight")), QuantLinear) for name in experts)
    found = logits(model)
    assert 0 < difference(found, logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))) < 0.05
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.out)), found)
    merged = family in ("qwen3_moe", "mixtral")
    assert merged == ("WARNING" not in " ".join(result.plan.notes))


@pytest.mark.parametrize("family", FUSED)
def test_calibrated(family, tmp_path):
    """Below rounding's error in what every expert gives, on the windows it was calibrated on."""
    source = make_model(tmp_path / "source", family)
    common = {"scheme": "w4a16", "group_size": 32, "calib_samples": 8, "calib_len": 64}
    out = qkit.convert(source, tmp_path / "out", method="gptq", **common).out
    entries = json.loads((out / "qkit_manifest.json").read_text())["tensors"]
    solved = [e for name, e in entries.items() if ".experts." in name and e["method"] == "gptq"]
    assert len(solved) > 12 and all(e["calibration_tokens"] > 0 for e in solved)
    assert difference(logits(qkit.load(out, device="cpu")), logits(qkit.load(source, device="cpu"))) < 0.4


@pytest.mark.parametrize("family", FUSED)
def test_what_is_not_quantized_stays_one_tensor(family, tmp_path):
    """A block whose experts are skipped, and formats that quantize none, have them as transformers loads them."""
    source = make_model(tmp_path / "source", family)
    raw = FolderSource(source)
    names = [name for name in sliced(raw).fused if ".layers.0." in name]
    out = qkit.convert(source, tmp_path / "out", method="rtn", group_size=32, skip=["*.layers.0.*.experts.*"]).out
    written = FolderSource(out)
    assert all(torch.equal(written.read(name), raw.read(name)) for name in names)
    assert not any(name.replace("layers.0", "layers.1") in written.names() for name in names)
    assert difference(logits(qkit.load(out, device="cpu")), logits(qkit.load(source, device="cpu"))) < 0.4
    for fmt, scheme in (("bnb", "nf4"), ("safetensors", "none")):
        kept = qkit.convert(
            source, tmp_path / fmt, format=fmt, scheme=scheme, method=None if fmt == "safetensors" else "rtn"
        )
        found = FolderSource(kept.out)
        assert all(torch.equal(found.read(name), raw.read(name)) for name in sliced(raw).fused), fmt
        assert ("WARNING" in " ".join(kept.plan.notes)) == (fmt == "bnb")


def test_gguf_of_fused_experts(tmp_path):
    """The file of a model saved fused is that of the same model saved with one matrix per expert."""
    files = []
    for original in (True, False):
        source = tmp_path / f"source-{original}"
        make_model(source, "qwen3_moe", save_original_format=original, hidden_size=256, norm_topk_prob=True)
        out = qkit.convert(source, tmp_path / f"out-{original}", format="gguf", scheme="q4_0", method="rtn").out
        files.append(next(out.glob("*.gguf")).read_bytes())
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """(a folder as OpenAI's are: experts in blocks and scales; the same model at 16 bits, by transformers' decoder)."""
    root = tmp_path_factory.mktemp("gpt-oss")
    plain = make_model(root / "plain", "gpt_oss")
    stored, values = load_file(plain / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, in_, out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (count, out, in_ // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 123, (count, out, in_ // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales)
    folder = root / "mxfp4"
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    for target, tensors in (
        (plain, {**{n: t for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}, **values}),
        (folder, stored),
    ):
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((plain / name).read_bytes())
    return folder, plain


def weights(folder):
    source = FolderSource(folder)
    source = sliced(source) or source
    reader = formats.reader(source.config)
    found = formats.quantized_modules(reader, source)
    return {module: formats.read_weight(reader, source, module, scheme) for module, scheme in found.items()}


def test_mxfp4_is_read_as_transformers_does(gpt_oss):
    folder, plain = gpt_oss
    expected = sliced(FolderSource(plain))
    found = weights(folder)
    assert len(found) == 2 * 4 * 3
    for module, weight in found.items():
        assert torch.equal(values_of(weight, torch.bfloat16), expected.read(f"{module}.weight")), module
    shown = inspect(str(folder))
    assert shown.schemes == {"mxfp4 g32": 24}
    assert shown.parameters == inspect(str(plain)).parameters
    packed, exact = qkit.load(folder, device="cpu"), qkit.load(plain, device="cpu")
    assert isinstance(packed.model.layers[0].mlp.experts[0].up_proj, QuantLinear)
    assert difference(logits(packed), logits(exact)) < 0.02


def test_mxfp4_repacked_without_loss(gpt_oss, tmp_path):
    folder, _ = gpt_oss
    result = qkit.convert(folder, tmp_path / "out")
    assert "24 weights are repacked" in " ".join(result.plan.notes)
    before, after = weights(folder), weights(result.out)
    for module, weight in before.items():
        assert torch.equal(codes_of(weight), codes_of(after[module])) and torch.equal(weight.scale, after[module].scale)
    assert torch.equal(logits(qkit.load(result.out, device="cpu")), logits(qkit.load(folder, device="cpu")))


def test_mxfp4_dequantized(gpt_oss, tmp_path):
    """Exported, it is the 16-bit model that transformers makes of it; with another scheme it is rounded anew."""
    folder, plain = gpt_oss
    exported = qkit.convert(folder, tmp_path / "plain", format="safetensors", scheme="none")
    assert "24 weights that are quantized already are dequantized and stored as values" in " ".join(exported.plan.notes)
    one, other = FolderSource(exported.out), FolderSource(plain)
    assert one.names() == other.names()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())
    again = qkit.convert(folder, tmp_path / "again", scheme="w8a16", method="rtn", group_size=32)
    assert "rounded anew" in " ".join(again.plan.notes)
    assert difference(logits(qkit.load(again.out, device="cpu")), logits(qkit.load(plain, device="cpu"))) < 0.05


def test_mxfp4_written_as_gpt_oss_is(gpt_oss, tmp_path):
    """From 16 bits: transformers makes the same of the file; from gpt-oss' own file: the same bytes of every tensor."""
    folder, plain = gpt_oss
    result = qkit.convert(plain, tmp_path / "out", format="mxfp4")
    assert inspect(str(result.out), verify=True).problems == []
    written, original = (
        load_file(result.out / "model-00001-of-00001.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert {n: (t.dtype, t.shape) for n, t in written.items()} == {n: (t.dtype, t.shape) for n, t in original.items()}
    found = weights(result.out)
    for module, weight in weights(folder).items():  # values that are on the grid already
        assert torch.equal(values_of(weight, torch.float32), values_of(found[module], torch.float32)), module
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "model.layers.*.self_attn" in config["modules_to_not_convert"]
    theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.bfloat16)  # dequantized: there is no GPU
    assert torch.equal(logits(theirs), logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)))
    again = qkit.convert(folder, tmp_path / "again", format="mxfp4")
    same = load_file(again.out / "model-00001-of-00001.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in original.items()) and same.keys() == original.keys()


def test_mxfp4_is_for_gpt_oss(llama, gpt_oss, tmp_path):
    with pytest.raises(QkitError, match=r"format mxfp4 is that of gpt-oss .* this is llama"):
        qkit.convert(llama, tmp_path / "out", format="mxfp4")
    one_by_one = qkit.convert(gpt_oss[1], tmp_path / "one", scheme="w8a16", method="rtn", group_size=32).out
    with pytest.raises(QkitError, match="here is one for each"):
        qkit.convert(one_by_one, tmp_path / "out", format="mxfp4")
    with pytest.raises(QkitError, match="does not hold int4"):
        qkit.convert(gpt_oss[1], tmp_path / "out", format="mxfp4", scheme="w4a16")
