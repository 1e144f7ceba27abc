"""--head: the output head quantized where a format can hold it, tied to the embedding or not."""

from __future__ import annotations

import json

import pytest
import torch
from models import make_model

import qkit
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.runtime import QuantLinear
from qkit.sources.gguf import GgufFile

TOKENS = torch.arange(40).view(2, 20)


def logits(folder):
    with torch.inference_mode():
        return qkit.load(folder, device="cpu")(TOKENS).logits.float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize(("head", "bound"), [("8bit", 0.02), ("4bit", 0.25)])
def test_a_quantized_head(fmt, head, bound, tied, tmp_path):
    source = make_model(tmp_path / "source", tie_word_embeddings=tied, vocab_size=288)
    common = {"format": fmt, "scheme": "w8a16", "method": "rtn", "group_size": 32}
    kept = qkit.convert(source, tmp_path / "kept", **common).out
    out = qkit.convert(source, tmp_path / "out", head=head, **common)
    model = qkit.load(out.out, device="cpu")
    assert isinstance(model.lm_head, QuantLinear) and model.lm_head.bits == int(head[0])
    expected = logits(kept)
    assert 0 < float((logits(out.out) - expected).norm() / expected.norm()) < bound
    config = json.loads((out.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert inspect(str(out.out), verify=True).problems == []
    if fmt == "gptq":
        assert config["quantization_config"]["lm_head"] is True
    else:
        assert "lm_head" not in config["quantization_config"]["ignore"]
    if tied:
        assert any("the embedding stays at" in note for note in out.plan.notes)


def test_the_client_reads_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    import transformers

    source = make_model(tmp_path / "source", tie_word_embeddings=True)
    for head in ("8bit", "4bit"):
        out = qkit.convert(source, tmp_path / head, scheme="w4a16", method="rtn", group_size=32, head=head).out
        client = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        with torch.inference_mode():
            theirs = client(TOKENS).logits.float()
        assert float((theirs - logits(out)).norm() / theirs.norm()) < 0.02


def test_calibrated_methods_round_the_head(tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 2, "calib_len": 64}
    out = qkit.convert(source, tmp_path / "out", group_size=32, head="8bit", method="gptq", **calibration).out
    entries = json.loads((out / "qkit_manifest.json").read_text())["tensors"]
    assert entries["lm_head.weight"]["method"] == "rtn" and entries["lm_head.weight"]["scheme"]["grid"]["bits"] == 8
    assert entries["model.layers.0.mlp.up_proj.weight"]["method"] == "gptq"


@pytest.mark.parametrize(("head", "block"), [("keep", "BF16"), ("8bit", "Q8_0"), ("4bit", "Q4_K"), (None, "Q6_K")])
def test_gguf(head, block, tmp_path):
    source = make_model(tmp_path / "source", hidden_size=256, head_dim=64)
    out = qkit.convert(source, tmp_path / "out", format="gguf", method="rtn", scheme="q5_k_m", head=head).out
    (file,) = out.glob("*.gguf")
    assert GgufFile(file).tensors["output.weight"].type.name == block


def test_what_each_costs_is_said(tmp_path):
    for tied, word in ((False, "takes"), (True, "adds")):
        source = make_model(tmp_path / word, tie_word_embeddings=tied, vocab_size=288)
        notes = " ".join(qkit.convert(source, tmp_path / "out", dry_run=True, group_size=32).plan.notes)
        assert f"--head 8bit {word} " in notes and f"--head 4bit {word} " in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "awq", "head": "8bit"}, "awq holds no quantized head"),
        ({"format": "bnb", "head": "4bit"}, "bnb holds no quantized head"),
        ({"head": "3bit"}, "not a way to store the head"),
        ({"format": "gptq", "head": "8bit"}, "lm_head.weight: GPTQ needs both sides divisible by 32"),
    ],
)
def test_refusals(options, message, llama, tmp_path):
    with pytest.raises(QkitError, match=message):
        qkit.convert(llama, tmp_path / "out", dry_run=True, **options)
