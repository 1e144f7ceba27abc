"""What a result says of where it comes from, and what it must not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from results import QUICK, contents
from safetensors.torch import load_file, save_file

from qkit.conversion.run import convert
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.storage.manifest import Manifest


def test_names_and_paths_of_the_user_are_in_no_byte(llama: Path, tmp_path: Path) -> None:
    text = "\n".join(f"line {i} of a text that is long enough to calibrate on, number {i * 7}" for i in range(200))
    results = []
    for name in ("client-secret", "other"):
        place = tmp_path / name
        shutil.copytree(llama, place / name)
        (place / f"{name}.txt").write_text(text)
        convert(str(place / name), place / "out", calib=str(place / f"{name}.txt"), method="gptq", **QUICK)
        results.append(contents(place / "out"))
    assert results[0] == results[1]
    assert not any(b"client-secret" in data or str(tmp_path).encode() in data for data in results[0].values())


def test_the_licence_travels(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    head = (
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- de\nmodel-index: []\n---\n# x\n"
    )
    (source / "README.md").write_text(head)
    convert(str(source), tmp_path / "out", method="rtn")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.license_link, data.language) == ("other", "mine", "LICENSE", ["de"])
    (source / "README.md").write_text("---\n: : [broken\n---\n")
    convert(str(source), tmp_path / "again", method="rtn")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.license is None


def test_a_quantized_source_is_said_to_be_one(tmp_path: Path) -> None:
    from qkit.sources.types import Stored

    assert Stored(5, {"F32": 1, "Q4_1": 210}, True).describe() == "210 x Q4_1, 1 x F32"
    try:
        plan = convert("demo", tmp_path / "out", method="rtn", dry_run=True).plan
    except QkitError:
        pytest.skip("the demo model is not installed")
    assert any("itself quantized" in note and "Q4_1" in note for note in plan.notes)
    assert inspect("demo").nbytes < plan.bytes_in / 2


def test_demo_beside_a_folder_of_that_name(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(str(llama), "demo", method="rtn")
    try:
        found = inspect("demo")
    except QkitError:
        pytest.skip("the demo model is not installed")
    assert found.converted_by is None
    assert inspect("./demo").converted_by
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inspect("~/demo", verify=True).problems == []


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_tensor_makes_another_source(llama: Path, tmp_path: Path, where: str) -> None:
    from qkit.sources import open_source

    source = tmp_path / "source"
    shutil.copytree(llama, source)
    before = open_source(str(source)).fingerprint
    weights = load_file(source / "model.safetensors")
    for name in weights:
        changed = dict(weights)
        changed[name] = weights[name].clone()
        flat = changed[name].view(-1)
        flat[{"first": 0, "middle": len(flat) // 3, "last": -1}[where]] += 1
        if where == "middle":
            changed[name] = weights[name] * 2 + 1
        save_file(changed, source / "model.safetensors", {"format": "pt"})
        assert open_source(str(source)).fingerprint != before, name


def test_a_dry_run_refuses_what_the_run_would(llama: Path, tmp_path: Path) -> None:
    for given in ({"calib": str(tmp_path / "absent.txt")}, {"calib": str(tmp_path)}, {"calib_len": 100_000},
                  {"device": "cuda:7"}, {"device": "tpu"}):  # fmt: skip
        with pytest.raises(QkitError) as caught:
            convert(str(llama), tmp_path / "out", dry_run=True, **{**QUICK, **given})
        assert caught.value.hint or given.get("calib") == str(tmp_path)


def test_null_values_in_the_config_are_defaults(llama: Path, tmp_path: Path) -> None:
    import json

    source = tmp_path / "source"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    for key in ("quantization_config", "num_experts_per_tok", "num_local_experts", "sliding_window", "text_config"):
        config[key] = None
    (source / "config.json").write_text(json.dumps(config))
    assert convert(str(source), tmp_path / "out", method="gptq", **QUICK).plan.schemes
    config["num_local_experts"] = "many"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QkitError, match="num_local_experts"):
        convert(str(source), tmp_path / "odd", method="gptq", **QUICK)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_the_largest_finite_weight_is_no_traceback(llama: Path, tmp_path: Path, method: str, format: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 3e38
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    options = QUICK if method == "gptq" else {"method": "rtn"}
    try:
        convert(str(source), tmp_path / "out", format=format, **options)
    except QkitError as error:
        assert "down_proj" in error.message


def cli(llama: Path, out: Path, threads: int, method: str) -> None:
    """In a process of its own, whose thread pools have that size from the start."""
    more = ["--calib-samples", "4", "--calib-len", "32"] if method == "gptq" else ["--clip-search"]
    command = [sys.executable, "-m", "qkit", "convert", str(llama), "-o", str(out), "--method", method, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def test_rounding_gives_the_same_bytes_with_any_number_of_threads(llama: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 3):
        cli(llama, tmp_path / str(threads), threads, "rtn")
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_the_card_of_a_calibrated_result_says_what_it_was_computed_on(llama: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        cli(llama, tmp_path / str(threads), threads, "gptq")
        said = f"{threads} threads. The order of sums"
        assert said in " ".join((tmp_path / str(threads) / "README.md").read_text().split())
        entries = Manifest.load(tmp_path / str(threads)).tensors.values()
        assert all(entry["computed_on"].endswith(f"{threads} threads") for entry in entries)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_was_read_of_the_source_is_noted_and_compared(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = {"method": method, **(QUICK if method == "gptq" else {})}
    convert(str(llama), tmp_path / "out", **options)
    source = open_source(str(llama))
    noted = Manifest.load(tmp_path / "out").sources
    assert noted.keys() == set(source.names())
    for name in source.names():
        values = source.read(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert noted[name] == f"crc32:{zlib.crc32(values):08x}"
    monkeypatch.setattr("qkit.conversion.verify.digest_of", lambda crc: "crc32:00000000")
    with pytest.raises(QkitError, match="is not what it was when it was converted"):
        convert(str(llama), tmp_path / "changed", **options)
    assert not (tmp_path / "changed").exists()
