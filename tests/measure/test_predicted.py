"""What a profile predicts of a model before it runs it, and how it is held against what was measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import make_model

from qkit.estimate.memory import memory
from qkit.estimate.rates import fitted
from qkit.estimate.subject import of_described
from qkit.hardware.catalogue import find
from qkit.hardware.detect import LocalDevice, local_target
from qkit.measure import footprint, predicted, profile, speed
from qkit.sources import open_source

HERE = LocalDevice("cpu", "Some CPU", 32 << 30, 16 << 30, 2, (), None)
ASKED = predicted.Asked(prompt=64, generated=8, batch=2, context=100, largest=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny", dtype=torch.bfloat16))


def test_it_is_the_estimate_of_the_same_model_device_and_setting(folder):
    source = open_source(folder)
    said = predicted.before(source, HERE, 40.0, ASKED)
    found = of_described(source)
    held = memory(found.arch, found.weights, local_target(HERE, 40.0), "qkit", 100, 4)
    assert said["memory"]["total"] == held.total == sum(said["memory"]["parts"].values())
    assert said["weights"]["bytes"] == found.weights.total
    assert (
        said["kv_cache"]["bytes"] == 4 * 100 * 2 * 2 * 2 * 32 * 2
    )  # batch, tokens, layers, k and v, heads, width, bytes
    for name in ("decode", "prefill"):
        assert 0 < said[name]["low"] < said[name]["tokens_per_s"] < said[name]["high"]
    first = said["first"]
    assert first["seconds"] == pytest.approx(2 * 64 / said["prefill"]["tokens_per_s"])
    assert first["low"] < first["seconds"] < first["high"]
    assert said["problem"] is None and said["basis"]["bandwidth"] == "40.0 GB/s, read here"
    assert all(
        said[n]["measured"] is None and said[n]["error"] is None for n in ("decode", "first", "memory", "weights")
    )


def test_twice_the_bandwidth_is_faster_and_takes_the_same_memory(folder):
    slow, fast = (predicted.before(open_source(folder), HERE, gbs, ASKED) for gbs in (10.0, 20.0))
    assert slow["decode"]["tokens_per_s"] < fast["decode"]["tokens_per_s"] <= 2 * slow["decode"]["tokens_per_s"]
    assert slow["memory"] == fast["memory"]


def test_no_tensor_is_read(folder):
    def refuse(*given):
        raise AssertionError("a prediction reads no tensor")

    source = open_source(folder)
    for name in ("read", "read_into"):
        if hasattr(source, name):
            setattr(source, name, refuse)
    assert predicted.before(source, HERE, 40.0, ASKED)["problem"] is None


def test_errors_are_predicted_over_measured(folder):
    said = predicted.before(open_source(folder), HERE, 40.0, ASKED)
    ran = SimpleNamespace(
        decode_tps=said["decode"]["tokens_per_s"] / 1.25,
        prefill_tps=said["prefill"]["tokens_per_s"] * 2,
        ttft_median=0.5,
    )
    used = SimpleNamespace(total=said["memory"]["total"] * 2, weights=said["weights"]["bytes"], kv_cache=None)
    found = predicted.beside(said, [ran], used)
    assert found["decode"]["error"] == pytest.approx(0.25) and found["prefill"]["error"] == pytest.approx(-0.5)
    assert found["first"]["measured"] == 0.5
    assert found["first"]["error"] == pytest.approx(said["first"]["seconds"] / 0.5 - 1)
    assert found["memory"]["error"] == pytest.approx(-0.5) and found["weights"]["error"] == 0
    assert found["kv_cache"]["measured"] is None and found["kv_cache"]["error"] is None
    untimed = predicted.beside(said, [], used)
    assert untimed["decode"] == said["decode"] and untimed["memory"] == found["memory"]


def test_where_it_cannot_be_made_it_says_why(folder, monkeypatch):
    source = open_source(folder)
    nowhere = replace(HERE, id="cuda:0", name="Voodoo 2", cores=None)  # of no catalogue: neither bandwidth nor rate
    said = predicted.before(source, nowhere, 1000.0, ASKED)
    assert said["decode"] is said["prefill"] is said["first"] is None and "Voodoo 2" in said["problem"]
    assert said["memory"]["total"] > said["weights"]["bytes"] > 0
    source.config["model_type"], kept = "bert", source.config["model_type"]
    del source.config["num_hidden_layers"]
    said = predicted.before(source, HERE, 40.0, ASKED)
    source.config["model_type"] = kept
    assert said["decode"] is said["memory"] is said["weights"] is None and said["problem"]
    used = SimpleNamespace(total=1, weights=1, kv_cache=1)
    assert predicted.beside(said, [], used) == said


def test_a_gpu_s_bandwidth_is_the_catalogue_s(folder):
    card = LocalDevice("cuda:0", "NVIDIA H200", 139 << 30, 130 << 30, None, (), "h200-sxm")
    said = predicted.before(open_source(folder), card, 3000.0, ASKED, replace(fitted(), terms={}))
    assert said["basis"]["bandwidth"] == f"{find('h200-sxm').bandwidth_gbs:g} GB/s of the catalogue"
    assert "no figure of qkit" in said["basis"]["speed"] and said["problem"] is None


def test_a_profile_has_both_beside_each_other(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GENERATED", 4)
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "_CEILING_BYTES", 1 << 20)
    monkeypatch.setattr(footprint, "apart", lambda *given: footprint.measure(*given, threads=torch.get_num_threads()))
    result = profile(folder, device="cpu", context=40, batch=[2, 3], chunks=1, out=str(tmp_path / "r"))
    row = result.as_dict()["models"][0]
    said, first = row["predicted"], row["speed"][0]
    assert said["decode"]["measured"] == first["decode_tps"] and said["first"]["measured"] == first["ttft_median"]
    assert said["memory"]["measured"] == row["memory"]["total"]
    assert said["kv_cache"]["bytes"] == said["kv_cache"]["measured"] == row["memory"]["kv_cache"]
    assert abs(said["weights"]["error"]) < 0.01
    for name, unit in (
        ("decode", "tokens_per_s"),
        ("prefill", "tokens_per_s"),
        ("first", "seconds"),
        ("memory", "total"),
    ):
        assert said[name]["error"] == pytest.approx(said[name][unit] / said[name]["measured"] - 1)
    assert "figure" in said["basis"]["speed"] and "predicted" in result.formulas
