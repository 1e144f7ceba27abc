"""A model on devices, predicted: subjects from configs, headers and schemes; answers that hang together; the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import make_model

from qkit import convert
from qkit.errors import QkitError
from qkit.estimate.estimate import Asked, estimate
from qkit.estimate.prices import hosted, hosted_prices, purchase_price, rent
from qkit.estimate.render import describe
from qkit.estimate.subject import subject
from qkit.hardware.catalogue import catalogue, find, parse
from qkit.models.architecture import architecture

PUBLISHED = json.loads((Path(__file__).parents[2] / "benchmarks" / "published" / "models.json").read_text())
CONFIGS = {name: entry["config"] for entry in PUBLISHED for name in entry["names"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}


def config_of(tmp_path: Path, name: str, **more) -> str:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    given = {**CONFIGS[name], "max_position_embeddings": 131072, **more}
    (folder / "config.json").write_text(json.dumps(given))
    return str(folder)


def test_every_published_model_has_an_architecture():
    for entry in PUBLISHED:
        assert architecture(entry["config"]).basis == "known family", entry["names"]


def test_a_config_alone(tmp_path: Path):
    found = subject(config_of(tmp_path, "Llama-3.1-8B"))
    assert found.weights.total == 2 * 8_030_261_248 and found.spec is None and "config.json alone" in found.basis


def test_a_config_that_declares_a_quantization(tmp_path: Path):
    """DeepSeek-V3 as published: 671 B parameters, of which linears are FP8 with a float32 scale per 128 x 128."""
    found = subject(config_of(tmp_path, "DeepSeek-V3", quantization_config=FP8))
    assert found.spec.kind == "fp8" and found.spec.scale.block == (128, 128)
    linears = found.weights.of_class("attention", "mlp", "expert", "shared")
    assert linears == pytest.approx(
        sum(m.numel for layer in found.arch.layers for m in layer.matrices if m.role != "router"), rel=1e-3
    )


def test_gpt_oss_keeps_its_attention(tmp_path: Path):
    given = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    found = subject(config_of(tmp_path, "gpt-oss-20b", quantization_config=given))
    assert found.spec.kind == "mxfp4" and 12.5e9 < found.weights.total < 14.5e9  # 13.8 GB on the Hub
    attention = sum(m.numel for layer in found.arch.layers for m in layer.matrices if m.role == "attention")
    assert found.weights.of_class("attention") == 2 * attention


@pytest.mark.parametrize(
    ("format", "scheme"), [("compressed-tensors", "w4a16"), ("gptq", "w8a16"), ("bnb", "nf4"), ("gguf", "q8_0")]
)
def test_as_it_would_be_converted_is_as_it_is_converted(tmp_path: Path, format: str, scheme: str):
    source = make_model(tmp_path / "m")
    out = tmp_path / "out"
    convert(str(source), str(out), format=format, scheme=scheme, method="rtn")
    before, after = subject(str(source), format, scheme), subject(str(out))
    assert after.weights.total == pytest.approx(before.weights.total, rel=0.01)
    assert after.spec.kind == before.spec.kind and after.spec.bits == before.spec.bits
    assert (after.container == "gguf") == (format == "gguf")


def test_a_quantized_folder_by_its_config_alone(tmp_path: Path):
    """What a config declares gives the bytes that the headers have."""
    out = tmp_path / "out"
    convert(str(make_model(tmp_path / "m")), str(out), scheme="w4a16-asym", method="rtn")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((out / "config.json").read_bytes())
    whole, alone = subject(str(out)), subject(str(tmp_path / "alone"))
    assert alone.weights.total == pytest.approx(whole.weights.total, rel=0.01)
    assert alone.spec.bits == whole.spec.bits == 4


def test_the_seed_question(tmp_path: Path):
    """A 70B at 4 bits on one card of 80 GB: it fits, with room for tens of thousands of tokens."""
    model = config_of(tmp_path, "Llama-3.3-70B")
    four = estimate(model, parse("h100-sxm"), Asked(scheme="w4a16")).answers[0]
    assert four.fit.fits and 60_000 < four.fit.largest_context(1) < 131_072
    assert 20 < four.speeds.decode.low < four.speeds.decode.tokens_per_s < four.speeds.decode.high < 120
    assert four.costs and four.costs.usd_per_hour == rent(find("h100-sxm")).usd_per_hour
    sixteen = estimate(model, parse("h100-sxm"), Asked()).answers[0]
    assert not sixteen.fit.fits and sixteen.speeds is None and sixteen.unknown == "it does not fit"
    pair = estimate(model, parse("h100-sxm:2"), Asked()).answers[0]
    assert pair.fit.fits and pair.costs.usd_per_hour == 2 * four.costs.usd_per_hour


def test_the_next_step_down(tmp_path: Path):
    found = estimate(config_of(tmp_path, "Llama-3.3-70B"), parse("h100-sxm"), Asked())
    names = [step.name for step in found.steps[0]]
    assert any("w4a16" in name for name in names) and any(step.fit.fits for step in found.steps[0])
    assert not estimate(config_of(tmp_path, "Llama-3.3-70B"), parse("h100-sxm"), Asked(scheme="w4a16")).steps


def test_prices(tmp_path: Path):
    model = config_of(tmp_path, "Llama-3.3-70B")
    known = hosted(architecture(CONFIGS["Llama-3.3-70B"]))
    assert known.model == "Llama-3.3-70B" and known.date and known.source
    assert hosted(architecture({**CONFIGS["Llama-3.3-70B"], "num_hidden_layers": 60})) is None
    found = estimate(model, parse("h100-sxm"), Asked(scheme="w4a16", usd_per_hour=2.0, hosted=(1.0, 4.0))).answers[0]
    assert found.costs.usd_per_hour == 2.0 and found.costs.source == "given"
    assert found.against.hosted == pytest.approx((3 * 1.0 + 4.0) / 4)
    dear = estimate(model, parse("h100-sxm"), Asked(scheme="w4a16", usd_per_hour=2.0, hosted=(30.0,))).answers[0]
    assert dear.against.first == pytest.approx(2.0 * 730.5 / 30)
    assert purchase_price(find("rtx-4090")).usd == 1599


def test_every_hosted_price_is_dated_and_sourced():
    for each in hosted_prices():
        assert each.usd_in > 0 and each.usd_out > 0 and each.date >= "2026" and each.source


def test_all_devices_are_answered_within_two_seconds_of_a_process(tmp_path: Path):
    """The command as a user runs it; the bound is generous where other work runs beside it."""
    models = ["Llama-3.1-8B", "Llama-3.3-70B", "Qwen3-32B", "Mixtral-8x7B", "Gemma-3-27B", "DeepSeek-V3"]
    code = (
        "import sys, time\nfrom qkit.estimate.estimate import estimate\nfrom qkit.hardware.catalogue import parse\n"
        "start = time.process_time()\n"
        "for model in sys.argv[1:]:\n    print(len(estimate(model, parse('all')).answers))\n"
        "print(time.process_time() - start)\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    folders = [config_of(tmp_path, name) for name in models]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *counts, seconds = done.stdout.split()
    assert counts == [str(len(catalogue()))] * len(models)
    assert float(seconds) < 2 * len(models)


def test_what_engines_do_not_run_is_said(tmp_path: Path):
    found = estimate(config_of(tmp_path, "Llama-3.1-8B"), parse("m4-max-40c"), Asked(engine="vllm")).answers[0]
    assert not found.fit.fits and "Apple" in found.unknown and found.speeds is None


@pytest.mark.parametrize(
    ("format", "scheme", "device", "slow"),
    [
        ("compressed-tensors", "w4a16", "h100-sxm", False),
        ("compressed-tensors", "w4a16", "mi300x", True),
        ("compressed-tensors", "fp8", "a100-80g-sxm", False),  # Marlin takes its weights
        ("compressed-tensors", "fp8", "epyc-9654", True),
        ("compressed-tensors", "nvfp4a16", "rtx-4090", False),
        ("bnb", "nf4", "mi300x", True),
        ("gguf", "q4_k_m", "mi300x", False),
        (None, None, "mi300x", False),
    ],
)
def test_formats_without_fast_kernels_are_said(tmp_path: Path, format: str, scheme: str, device: str, slow: bool):
    found = estimate(config_of(tmp_path, "Llama-3.1-8B"), parse(device), Asked(format=format, scheme=scheme))
    assert ("no fast kernels" in found.answers[0].slow) == slow == ("no fast kernels" in describe(found))


def test_text_says_that_it_is_predicted(tmp_path: Path):
    model = config_of(tmp_path, "Llama-3.1-8B")
    one = describe(estimate(model, parse("rtx-4090"), Asked()))
    assert "PREDICTED" in one and "FITS" in one and "tokens of context" in one and "$" in one
    every = describe(estimate(model, parse("all"), Asked()))
    assert " devices with 8,192 tokens" in every and "rtx-4090" in every and "does not fit" in every
    assert max(map(len, f"{one}\n{every}".splitlines())) <= 120


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (Asked(scheme="w5a16"), "unknown scheme"),
        (Asked(format="zip"), "unknown format"),
        (Asked(context=1 << 20), "longer than"),
        (Asked(kv_cache="int3"), "no type of a KV cache"),
        (Asked(hosted=(1.0, 2.0, 3.0)), "one price"),
        (Asked(engine="abacus"), "unknown engine"),
        (Asked(utilization=0.0), "utilization"),
    ],
)
def test_bad_questions(tmp_path: Path, asked: Asked, word: str):
    with pytest.raises(QkitError, match=word):
        estimate(config_of(tmp_path, "Llama-3.1-8B"), parse("rtx-4090"), asked)


def test_a_config_that_lacks_what_it_takes(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(QkitError, match="missing") as caught:
        estimate(str(tmp_path), parse("rtx-4090"))
    assert caught.value.hint
