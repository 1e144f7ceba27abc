"""What a result says of where it comes from, and what it must not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from qkit.conversion.run import convert
from qkit.errors import QkitError
from qkit.inspection import inspect

QUICK = {"method": "gptq", "calib_samples": 4, "calib_len": 32}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_names_and_paths_of_the_user_are_in_no_byte(llama: Path, tmp_path: Path) -> None:
    text = "\n".join(f"line {i} of a text that is long enough to calibrate on, number {i * 7}" for i in range(200))
    results = []
    for name in ("client-secret", "other"):
        place = tmp_path / name
        shutil.copytree(llama, place / name)
        (place / f"{name}.txt").write_text(text)
        convert(str(place / name), place / "out", calib=str(place / f"{name}.txt"), **QUICK)
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
    assert convert(str(source), tmp_path / "out", **QUICK).plan.schemes
    config["num_local_experts"] = "many"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QkitError, match="num_local_experts"):
        convert(str(source), tmp_path / "odd", **QUICK)


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
