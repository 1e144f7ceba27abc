"""Weights as engines hold them, against the tensors of models that were loaded."""

from __future__ import annotations

import pytest
import torch
from models import make_model

from qkit.conversion.run import convert
from qkit.estimate.estimate import Asked, estimate
from qkit.estimate.loaded import as_loaded
from qkit.estimate.subject import of_described
from qkit.hardware.detect import local_target, resolve
from qkit.kernels import backend
from qkit.measure import memory, speed
from qkit.runtime import load
from qkit.sources.described import describe_source

ROTARY = 2 * 16 * 4  # bytes of the frequencies, which a model computes and no checkpoint holds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base", dtype=torch.bfloat16)


def loaded(path) -> int:
    model = load(str(path), device="cpu")
    speed.steps(model, torch.tensor([[1, 2, 3]]), 2)  # kernels take their layouts with the first run
    return memory.weights(model).total - ROTARY


def said(path, engine="qkit", kind="cpu"):
    return as_loaded(of_described(describe_source(str(path))), engine, kind)


@pytest.mark.skipif(backend().startswith("torch"), reason="without the C++ library weights stay as they were stored")
@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compressed-tensors", "w4a16"), ("compressed-tensors", "w8a16"), ("compressed-tensors", "w4a16-asym"),
        ("compressed-tensors", "fp8"), ("compressed-tensors", "nvfp4a16"), ("compressed-tensors", "mxfp4a16"),
        ("gptq", "w3a16"), ("gptq", "w2a16"), ("awq", "w4a16-asym"), ("bnb", "nf4"), ("bnb", "nf4-dq"), ("bnb", "int8"),
    ],
)  # fmt: skip
def test_what_qkit_holds_on_a_cpu(base, tmp_path, format, scheme):
    convert(str(base), str(tmp_path / "out"), format=format, scheme=scheme, method="rtn")
    assert said(tmp_path / "out").weights.total == pytest.approx(loaded(tmp_path / "out"), rel=0.01)


def test_a_gguf_file_is_expanded_by_qkit_and_transformers_and_not_by_llama_cpp(base, tmp_path):
    convert("demo", str(tmp_path / "out"), format="gguf", scheme="q4_0", method="rtn")
    path = next((tmp_path / "out").glob("*.gguf"))
    stored = of_described(describe_source(str(path)))
    found = said(path)
    assert found.spec is None and "expanded to BF16" in found.stored
    assert found.weights.total == 2 * found.arch.parameters > 2 * stored.weights.total
    assert said(path, "transformers", "gpu").weights == found.weights
    assert said(path, "llama.cpp") == stored
    here = (local_target(resolve("cpu"), 30.0),)
    totals = {
        e: estimate(str(path), here, Asked(256, engine=e)).answers[0].fit.memory.of("weights")
        for e in ("qkit", "llama.cpp")
    }
    assert totals == {"qkit": found.weights.total, "llama.cpp": stored.weights.total}


def test_elsewhere_it_is_as_stored(base, tmp_path):
    convert(str(base), str(tmp_path / "out"), format="gptq", scheme="w3a16", method="rtn")
    stored = of_described(describe_source(str(tmp_path / "out")))
    assert said(tmp_path / "out", "qkit", "gpu") == stored == said(tmp_path / "out", "vllm")
    assert said(base).weights == of_described(describe_source(str(base))).weights
