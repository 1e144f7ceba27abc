"""`convert --fit DEVICE`: the scheme follows the memory of a card, down to one so small that only that scheme fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import make_model
from results import QUICK, contents

from qkit.conversion.run import convert
from qkit.errors import QkitError
from qkit.estimate.fit import fit
from qkit.estimate.steps import LADDERS, engine_of
from qkit.estimate.weights import of_architecture
from qkit.hardware.catalogue import parse
from qkit.hardware.device import GIB
from qkit.inspection import inspect
from qkit.models.architecture import architecture

CONTEXT, BATCH = 128, 2
SHARE = {"vllm": 0.92, "transformers": 0.95, "llama.cpp": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Wide enough for k-quants."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=256, intermediate_size=512, head_dim=64)


def write_card(folder: Path, nbytes: float) -> str:
    path = folder / "my-card.json"
    path.write_text(json.dumps({"name": "My card", "memory_gib": 1, "usable_gib": nbytes / GIB, "bandwidth_gbs": 100}))
    return str(path)


def needs(model: Path, folder: Path, format: str) -> dict[str, float]:
    """Scheme -> bytes that a card must have for it."""
    arch = architecture(json.loads((model / "config.json").read_text()))
    target = parse(write_card(folder, GIB / 2))[0]
    engine = engine_of(format, target.device)
    ladder = ["w8a16" if s == "fp8" else s for s in LADDERS[format]]
    return {
        s: fit(arch, of_architecture(arch, s, format), target, engine, CONTEXT, BATCH).memory.total / SHARE[engine]
        for s in ladder
    }


@pytest.mark.parametrize(
    ("format", "scheme"), [(f, s) for f in ("compressed-tensors", "gptq", "awq", "bnb", "gguf") for s in LADDERS[f]]
)
def test_each_scheme_is_what_some_card_gets(model, tmp_path, format, scheme):
    scheme = "w8a16" if scheme == "fp8" else scheme  # of a card that says nothing of FP8
    least = needs(model, tmp_path, format)
    card = write_card(tmp_path, least[scheme] + 1024)
    given = {"format": format, "fit": card, "context": CONTEXT, "batch": BATCH}
    plan = convert(str(model), tmp_path / "out", dry_run=True, **given).plan
    assert plan.options.scheme == scheme
    note = plan.notes[0]
    assert note.startswith(f"--fit chose {scheme}: the best scheme of {format} that fits my-card in ")
    assert f"{BATCH} x {CONTEXT} tokens" in note
    same = convert(str(model), tmp_path / "same", dry_run=True, format=format, scheme=scheme).plan
    assert plan.bytes_out == same.bytes_out and plan.schemes == same.schemes


@pytest.mark.parametrize(("format", "scheme"), [("compressed-tensors", "w4a16"), ("gptq", "w3a16"), ("gguf", "q4_k_m")])
def test_the_result_is_the_scheme_s_own(model, tmp_path, format, scheme):
    """Byte for byte, identity included: --fit is one way to say --scheme."""
    card = write_card(tmp_path, needs(model, tmp_path, format)[scheme] + 1024)
    method = {"method": "rtn"}
    convert(str(model), tmp_path / "a", format=format, fit=card, context=CONTEXT, batch=BATCH, **method)
    convert(str(model), tmp_path / "b", format=format, scheme=scheme, **method)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert inspect(str(tmp_path / "a"), verify=True).problems == []
    again = convert(str(model), tmp_path / "a", format=format, scheme=scheme, **method)
    assert again.already_done


def test_the_default_method_follows_the_chosen_scheme(model, tmp_path):
    card = write_card(tmp_path, needs(model, tmp_path, "gptq")["w4a16"] + 1024)
    given = {"format": "gptq", "fit": card, "context": CONTEXT, "batch": BATCH, **QUICK}
    assert convert(str(model), tmp_path / "out", dry_run=True, **given).plan.method.name == "gptq"


def test_a_card_of_the_catalogue_and_the_default_load(model, tmp_path):
    plan = convert(str(model), tmp_path / "out", dry_run=True, fit="rtx-4090").plan
    assert plan.options.scheme == "fp8" and "1 x 512 tokens" in plan.notes[0]  # what the model takes
    plan = convert(str(model), tmp_path / "out", dry_run=True, fit="a100-80g-sxm:2").plan
    assert plan.options.scheme == "w8a16" and "a100-80g-sxm:2" in plan.notes[0]


def test_a_quantized_source_gets_no_more_bits_than_it_has(model, tmp_path):
    convert(str(model), tmp_path / "w4", scheme="w4a16", method="rtn")
    plan = convert(str(tmp_path / "w4"), tmp_path / "out", dry_run=True, fit="rtx-4090").plan
    assert plan.options.scheme == "w4a16"


@pytest.mark.parametrize(("scheme", "chosen"), [("q8_0", "q8_0"), ("q4_0", "q4_k_m")])
def test_a_gguf_file_gets_no_more_bits_than_most_of_it_has(model, tmp_path, scheme, chosen):
    convert(str(model), tmp_path / "g", format="gguf", scheme=scheme, method="rtn")
    (source,) = (tmp_path / "g").glob("*.gguf")
    plan = convert(str(source), tmp_path / "out", dry_run=True, fit="rtx-4090", format="gguf").plan
    assert plan.options.scheme == chosen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fit": "rtx-4090", "scheme": "w4a16"}, "--fit and --scheme do not go together"),
        ({"fit": "rtx-4090", "recipe": "r.yaml"}, "--fit and --recipe do not go together"),
        ({"fit": "rtx-4090", "skip": ("*.down_proj",)}, "--fit and --skip do not go together"),
        ({"context": 100}, "--context belongs to --fit"),
        ({"batch": 2}, "--batch belongs to --fit"),
        ({"fit": "rtx-4090", "context": 513}, "513 tokens is longer than the 512"),
        ({"fit": "rtx-4091"}, "unknown device"),
        ({"fit": "all"}, "--fit takes one device, not"),
        ({"fit": "epyc-9654"}, "memory of .* is not known"),
        ({"fit": "rtx-4090", "format": "safetensors"}, "no schemes to choose from"),
        ({"fit": "no/such.json"}, "there is no file"),
    ],
)
def test_refusals_come_before_work(model, tmp_path, given, message):
    with pytest.raises(QkitError, match=message):
        convert(str(model), tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_nothing_fits(model, tmp_path):
    least = needs(model, tmp_path, "gguf")
    card = write_card(tmp_path, least["q2_k"] - (1 << 20))
    with pytest.raises(QkitError, match="no scheme of gguf fits my-card: q2_k, the smallest, needs") as error:
        convert(str(model), tmp_path / "out", format="gguf", fit=card, context=CONTEXT, batch=BATCH)
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_the_card_is_an_input_that_the_result_must_not_replace(model, tmp_path):
    card = write_card(tmp_path, GIB / 2)
    with pytest.raises(QkitError):
        convert(str(model), tmp_path, fit=card)
    assert Path(card).exists()
