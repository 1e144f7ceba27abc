"""A conversion spread over a real Ray cluster, several raylets on this machine, is byte for byte that of one machine:
whatever dies meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interop import clients
from models import make_model
from results import contents

from qkit.conversion.run import convert
from qkit.conversion.workspace import partial_dir

FORMATS = {
    "compressed-tensors": {"method": "rtn", "shard_size": 3_000_000},
    "gptq": {"format": "gptq", "method": "rtn", "shard_size": 3_000_000},
    "awq": {"format": "awq", "method": "rtn", "shard_size": 3_000_000},
    "bnb": {"format": "bnb", "shard_size": 3_000_000},
}
GGUF = {"format": "gguf", "method": "rtn"}
CALIBRATED = {"method": "gptq", "calib_samples": 40, "calib_len": 128}
SLOW = {"method": "rtn", "clip_search": True, "shard_size": 1_000_000}  # seconds, so that there is a middle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    return make_model(tmp_path_factory.mktemp("ray") / "model", **sizes)


@pytest.fixture(scope="module")
def ran(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """(what happened in each scenario, the folder of the results)."""
    return _run(model, tmp_path_factory.mktemp("client"), tmp_path_factory.mktemp("out"))


@clients.once
def _run(model: Path, folder: Path, out: Path) -> tuple[dict[str, Any], Path]:
    installed = clients.install_qkit(folder / "qkit")
    job = {
        "source": str(model),
        "out": str(out),
        "formats": FORMATS,
        "slow": SLOW,
        "gguf": GGUF,
        "calibrated": CALIBRATED,
    }
    printed = clients.run("ray", job, folder, extra={"PYTHONPATH": str(installed)})
    return json.loads(printed.splitlines()[-1]), out


def same(model: Path, out: Path, alone: Path, options: dict[str, Any]) -> None:
    convert(str(model), alone, **options)
    assert contents(out) == contents(alone)
    assert not partial_dir(out).exists()


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_spread(name: str, model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    said, out = ran
    assert said[name]["files"] >= 4
    same(model, out / name, tmp_path / "out", FORMATS[name])


def test_tensors_of_one_file_are_spread(model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    said, out = ran
    assert said["gguf"]["files"] == 1
    same(model, out / "gguf", tmp_path / "out", GGUF)


@pytest.mark.parametrize("died", ["worker", "machine"])
def test_what_dies_midway_changes_nothing(
    died: str, model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    said, out = ran
    assert said[died]["pid"] and 0 < said[died]["finished"] < said[died]["files"] and not said[died]["resumed"]
    assert died == "worker" or said[died]["left"] == 2  # of the three that were there
    same(model, out / died, tmp_path / "out", SLOW)


def test_calibration_is_spread(model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    said, out = ran
    same(model, out / "calibrated", tmp_path / "out", CALIBRATED)
    # A machine that dies in the middle of a block had inputs, sums and factors that others wait for.
    assert 2 <= said["block"]["finished"] < said["block"]["files"] and not said["block"]["resumed"]
    assert said["block"]["left"] == 1
    same(model, out / "block", tmp_path / "again" / "out", CALIBRATED)


def test_a_run_that_is_cut_off_goes_on_without_ray(
    model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    said, out = ran
    interrupted, killed, here = said["cut by Ctrl-C"], said["cut by a kill"], said["cut, then here"]
    assert interrupted["code"] == 130, interrupted["stderr"]
    assert "the same command continues" in interrupted["stderr"]
    assert killed["code"] == -9 and not interrupted["out"] and not killed["out"]
    assert "Traceback" not in interrupted["stderr"] + killed["stderr"]
    assert 0 < interrupted["finished"] <= killed["finished"] < here["files"] and here["resumed"]
    same(model, out / "cut", tmp_path / "out", SLOW)


def test_a_driver_outside_the_cluster(model: Path, ran: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    said, out = ran
    assert said["client"]["code"] == 0, said["client"]["stderr"]
    assert "Ray cluster: 3 machine(s), 3 core(s)" in said["client"]["stderr"]
    same(model, out / "client", tmp_path / "out", FORMATS["gptq"])


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_address_without_a_cluster(kind: str, ran: tuple[dict[str, Any], Path]) -> None:
    said, out = ran
    found = said["unreachable"][kind]
    assert found["message"].startswith("no Ray cluster at 127.0.0.1:") and "ray start --head" in found["hint"]
    assert found["seconds"] < 20 and not partial_dir(out / "unreachable").exists()
