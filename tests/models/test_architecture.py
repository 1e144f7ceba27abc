"""Architectures from config.json alone, against transformers' modules on meta."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
from architectures import CHANGED, SHRUNK, config_of
from config_defaults import FILE, extract
from published import PUBLISHED

from qkit.errors import QkitError
from qkit.models.architecture import FAMILY, USUAL, architecture
from qkit.models.architecture.keys import MOST

# Buffers that files hold; others are computed by whoever runs the model.
# What no config is without; the rest is left to the class's defaults.
WRITTEN = (
    "hidden_size", "d_model", "n_embd", "vocab_size", "num_hidden_layers", "num_attention_heads", "n_heads", "n_head",
    "num_heads", "text_config", "vision_config", "audio_config",
)  # fmt: skip
BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")


def counted(config: Any) -> int:
    """Parameters, each once, of transformers' model of a config, and what it has of BUFFERS."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    autos = [AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText, AutoModelForCausalLM]
    if not hasattr(config, "text_config"):
        autos.remove(AutoModelForImageTextToText)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config)
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith(BUFFERS))
    return sum(p.numel() for p in model.parameters()) + buffers


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    config, total, active = PUBLISHED[name]
    found = architecture(config)
    assert found.basis == FAMILY
    assert found.parameters == counted(config_of(config))
    if total is not None:
        assert found.parameters == total
    if active is not None:
        assert found.active_parameters == pytest.approx(active, rel=0.06)


@pytest.mark.parametrize("kind", SHRUNK)
def test_parameters_of_every_family(kind):
    """Its class's defaults, which count where a config is silent, with fewer layers."""
    config = config_of({"model_type": kind, **SHRUNK[kind]})
    found = architecture(config.to_dict())
    assert (found.basis, found.parameters) == (FAMILY, counted(config))


@pytest.mark.parametrize("kind", CHANGED)
def test_parameters_where_a_config_says_something_unusual(kind):
    config = config_of({"model_type": kind, **CHANGED[kind]})
    assert architecture(config.to_dict()).parameters == counted(config)


@pytest.mark.parametrize("kind", SHRUNK)
def test_a_config_as_it_is_saved_means_the_same(kind):
    """What an author wrote, without what the class adds."""
    given = {"model_type": kind, **SHRUNK[kind]}
    config = config_of(given).to_dict()
    written = {key: config[key] for key in WRITTEN if key in config}
    found, full = architecture({**written, **given}), architecture(config)
    assert replace(found, mtp=(), mtp_vectors=0) == replace(full, mtp=(), mtp_vectors=0)


def test_the_defaults_are_those_of_transformers():
    """Made anew with: python tests/config_defaults.py"""
    import transformers

    written = json.loads(FILE.read_text(encoding="utf-8"))
    if written["transformers"] != transformers.__version__:
        pytest.skip(f"made from transformers {written['transformers']}")
    assert written == extract()


@pytest.mark.parametrize("kind", ["youtu", "solar_open", "exaone_moe", "hyperclovax", "vaultgemma", "aria_text"])
def test_a_family_that_is_not_known_is_read_by_the_usual_keys(kind):
    config = config_of({"model_type": kind})
    found = architecture(config.to_dict())
    assert found.basis == USUAL
    assert found.parameters == pytest.approx(counted(config), rel=0.01)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("kind", ["llama", "of-no-family"])
def test_what_is_missing_is_named(kind, missing):
    config = {k: v for k, v in PUBLISHED["Llama-3.1-8B"][0].items() if k != missing} | {"model_type": kind}
    with pytest.raises(QkitError, match=missing):
        architecture(config)


@pytest.mark.parametrize("value", [0, -1, 1.5, "4096", True, [4096], {}, MOST * 2, 10**40, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim"])
def test_what_is_impossible_is_named(key, value):
    with pytest.raises(QkitError, match=key):
        architecture({**PUBLISHED["Llama-3.1-8B"][0], key: value})


VALUES = [
    None,
    0,
    1,
    -3,
    7,
    2.5,
    1e300,
    float("nan"),
    "x",
    "",
    True,
    [],
    [1],
    ["full_attention"],
    [None],
    {},
    {"a": 1},
    10**30,
]


@pytest.mark.parametrize("kind", SHRUNK)
def test_a_damaged_config_raises_nothing_but_a_clear_error(kind):
    """Every key in turn missing, null or absurd, and some at once."""
    config = config_of({"model_type": kind, **SHRUNK[kind]}).to_dict()
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["num_hidden_layers"] = 3
    rng = random.Random(kind)
    damaged = [{k: v for k, v in config.items() if k != key} for key in config]
    damaged += [{**config, key: value} for key in config for value in VALUES]
    keys = list(config)
    damaged += [{**config, **{rng.choice(keys): rng.choice(VALUES) for _ in range(6)}} for _ in range(200)]
    for nested in ("text_config", "vision_config", "audio_config"):
        if isinstance(config.get(nested), dict):
            inner = config[nested]
            damaged += [{**config, nested: {**inner, key: value}} for key in inner for value in VALUES]
            damaged += [{**config, nested: {k: v for k, v in inner.items() if k != key}} for key in inner]
    for each in damaged:
        try:
            found = architecture(each)
        except QkitError as error:
            assert str(error)
        else:
            assert found.parameters > 0 and found.active_parameters > 0


def test_anything_may_be_given_in_place_of_a_config():
    for given in (
        None,
        [],
        "llama",
        {},
        {"model_type": None},
        {"model_type": 3},
        {"text_config": {}},
        {"model_type": ""},
    ):
        with pytest.raises(QkitError):
            architecture(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear_attention", "mamba", "conv", "mlp", "moe", "hybrid", "cross_attention"])
def test_a_kind_of_layer_that_a_family_does_not_have(kind):
    """Of a family that is not known, too."""
    for name in ("llama", "unheard_of"):
        config = {**PUBLISHED["Llama-3.1-8B"][0], "model_type": name, "num_hidden_layers": 2}
        with pytest.raises(QkitError, match="none that are known here"):
            architecture({**config, "layer_types": ["full_attention", kind]})


def test_mtp_layers_are_counted_apart():
    """DeepSeek-V3's files hold 684.5 G values, of them 671.0 G in the model proper."""
    found = architecture(PUBLISHED["DeepSeek-V3"][0])
    assert found.parameters == 671_026_419_200
    assert found.mtp_parameters == pytest.approx(13.46e9, rel=0.005)
    assert architecture({**PUBLISHED["DeepSeek-V3"][0], "num_nextn_predict_layers": 0}).mtp_parameters == 0


def test_neither_torch_nor_transformers_is_needed():
    code = (
        "import json, sys; from qkit.models.architecture import architecture; from qkit.estimate.cache import kv_bytes;"
        "from qkit.estimate.weights import of_architecture; a = architecture(json.loads(sys.argv[1]));"
        "kv_bytes(a, 4096, engine='vllm'); of_architecture(a, 'w4a16', 'gptq'); of_architecture(a, 'q4_k_m', 'gguf');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    given = json.dumps(PUBLISHED["DeepSeek-V3"][0])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
