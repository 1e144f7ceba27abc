"""Bytes of weights: of an architecture against the plan of a conversion, of a checkpoint against its headers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from architectures import SHRUNK, config_of
from models import FAMILIES, FUSED, make_model

import qkit
from qkit.conversion.options import Options
from qkit.conversion.plan import make_plan
from qkit.errors import QkitError
from qkit.estimate.parts import Part, Weights
from qkit.estimate.weights import of_architecture, of_source
from qkit.models.architecture import architecture
from qkit.sources import open_source
from qkit.spec import integer

# Wide enough for every format: GPTQ's words, AWQ's and NVFP4's groups, FP8's blocks, super-blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}
EXPERTS = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
    "llama4_text": {"intermediate_size": 256, "intermediate_size_mlp": 512},
    "gpt_oss": {"intermediate_size": 256, "layer_types": None},
    "gemma3_text": {"num_hidden_layers": 12},
}
SCHEMES = [
    ("compressed-tensors", "w4a16"), ("compressed-tensors", "w4a16-asym"), ("compressed-tensors", "w8a16"),
    ("compressed-tensors", "w8a8"), ("compressed-tensors", "fp8"), ("compressed-tensors", "fp8-block"),
    ("compressed-tensors", "nvfp4a16"), ("compressed-tensors", "mxfp4a16"), ("gptq", "w4a16"), ("gptq", "w3a16"),
    ("gptq", "w8a16-asym"), ("awq", "w4a16-asym"), ("bnb", "nf4"), ("bnb", "nf4-dq"), ("bnb", "int8"),
    ("safetensors", "none"),
]  # fmt: skip
MIXES = ("q4_k_m", "q4_k_s", "q8_0", "q6_k", "q4_0", "q5_k_m", "q3_k_m", "q2_k", "iq4_xs", "mxfp4_moe", "bf16", "f16")


@pytest.fixture(scope="module")
def model(tmp_path_factory, request) -> Path:
    family = request.param
    return make_model(tmp_path_factory.mktemp(family) / "m", family, **{**WIDE, **EXPERTS.get(family, {})})


def planned(source, format: str, scheme: str | None, method: str = "rtn") -> list:
    plan = make_plan(source, Path("/tmp/never"), Options(format=format, scheme=scheme, method=method))
    return plan.tasks


@pytest.mark.parametrize("model", [*FAMILIES, *FUSED], indirect=True)
def test_the_bytes_are_those_of_a_conversion(model):
    source = open_source(str(model))
    arch = architecture(source.config)
    for format, scheme in SCHEMES:
        tasks = planned(source, format, scheme)
        weights = of_architecture(arch, scheme, format)
        at = f"{format} {scheme}"
        assert weights.total == sum(t.bytes_out for t in tasks), at
        assert sum(weights.by_class.values()) == weights.total, at
        quantized = sum(t.bytes_out for t in tasks if t.scheme)
        assert weights.quantized + weights.scales == quantized, at


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_the_bytes_of_a_gguf_file_are_those_of_a_conversion(model):
    source = open_source(str(model))
    arch = architecture(source.config)
    if arch.model_type == "gemma3_text":  # of its 260 rows the vocabulary, and so the file, has 259
        arch = dataclasses.replace(arch, embedding=dataclasses.replace(arch.embedding, out=259))
    for mix in MIXES:
        assert of_architecture(arch, mix, "gguf").total == sum(t.bytes_out for t in planned(source, "gguf", mix)), mix
    for mix in ("q4_0", "iq4_xs", "q4_k_m"):
        tasks = planned(source, "gguf", mix, "imatrix")
        assert of_architecture(arch, mix, "gguf", importance=True).total == sum(t.bytes_out for t in tasks), mix


@pytest.mark.parametrize("kind", SHRUNK)
def test_bytes_follow_parameters_in_every_family(kind):
    """At two bytes each; one token reads what it is multiplied with, and no more."""
    arch = architecture(config_of({"model_type": kind, **SHRUNK[kind]}).to_dict())
    weights = of_architecture(arch)
    assert weights.total == 2 * (arch.parameters + arch.mtp_parameters)
    # Zamba2's layers share a block, which is stored once and multiplied with again and again.
    again = 2 * sum(m.numel_active for layer in arch.layers for m in layer.matrices if not m.count)
    assert weights.read() == pytest.approx(2 * arch.active_parameters - again, abs=2)


def test_one_settled_scheme_is_taken_as_it_is():
    arch = architecture({"model_type": "llama", **SHAPE})
    coarse, fine = (of_architecture(arch, integer(4, size), "compressed-tensors") for size in (128, 32))
    linears = sum(m.numel for layer in arch.layers for m in layer.matrices)
    assert fine.scales - coarse.scales == linears * 2 // 32 - linears * 2 // 128
    assert fine.quantized == coarse.quantized == linears // 2


SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "format", "scheme", "message"),
    [
        ({}, "awq", "nf4", "does not hold"),
        ({}, "compressed-tensors", "nf5", "unknown scheme"),
        ({}, "gguff", "w4a16", "unknown format"),
        ({}, "gguf", "q4_k_xxl", "unknown"),
        ({}, "gguf", integer(4), "does not hold"),
        ({"intermediate_size": 500}, "compressed-tensors", "w4a16", "divides"),
        ({}, "fp8", "fp8", "does not hold"),
    ],
)
def test_refusals_are_those_of_a_conversion(changes, format, scheme, message):
    arch = architecture({"model_type": "llama", **SHAPE, **changes})
    with pytest.raises(QkitError) as caught:
        of_architecture(arch, scheme, format)
    assert message in str(caught.value)


@pytest.mark.parametrize(("format", "scheme"), [
    ("compressed-tensors", "w4a16-asym"), ("compressed-tensors", "nvfp4a16"), ("gptq", "w4a16"), ("awq", "w4a16-asym"),
    ("bnb", "nf4-dq"), ("gguf", "q4_k_m"), ("safetensors", "none"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_converted_folder_is_counted_exactly_and_alike(family, format, scheme, tmp_path):
    """Headers of what was written, class by class, against the formula for it."""
    changes = {**WIDE, "num_hidden_layers": 2, **EXPERTS.get(family, {})}
    source = make_model(tmp_path / "m", family, **changes)
    qkit.convert(source, tmp_path / "out", format=format, scheme=scheme, method="rtn" if scheme != "none" else None)
    written = open_source(str(tmp_path / "out"))
    counted = of_source(written)
    assert counted.total == written.stored.nbytes
    expected = of_architecture(architecture(open_source(str(source)).config), scheme, format)
    assert counted.by_class == expected.by_class
    assert counted.scales == expected.scales
    assert counted.read(3) == pytest.approx(expected.read(3))


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_a_checkpoint_is_counted_class_by_class(family, tmp_path):
    for original in (True, False):
        folder = tmp_path / str(original)
        source = open_source(str(make_model(folder, family, save_original_format=original)))
        counted = of_source(source)
        assert counted.total == source.stored.nbytes
        assert counted.by_class == of_architecture(architecture(source.config)).by_class


def test_a_step_reads_the_experts_that_it_is_expected_to_meet():
    experts = Part("expert", 1280, count=128, active=8)
    others = [Part("attention", 100), Part("embedding", 1000, active=0), Part("tower", 500, active=0), Part("head", 10)]
    weights = Weights.of([experts, *others])
    assert weights.read(1) == pytest.approx(100 + 10 + 1280 * 8 / 128)
    meets = 128 * (1 - (1 - 8 / 128) ** 4)
    assert weights.read(4) == pytest.approx(110 + 10 * meets)
    assert weights.read(100_000) == pytest.approx(110 + 1280)


def test_a_tied_embedding_is_read_and_a_separate_one_is_not():
    tied, apart = (
        of_architecture(architecture({"model_type": "llama", **SHAPE, "tie_word_embeddings": t})) for t in (True, False)
    )
    assert tied.read() == apart.read() == tied.total
    assert apart.total - apart.read() == 1000 * 256 * 2
