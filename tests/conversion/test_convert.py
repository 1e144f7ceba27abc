"""The data path as a user sees it: one call, one folder; interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import make_model
from results import QUICK, contents
from safetensors.torch import load_file, save_file

from qkit.conversion.run import convert
from qkit.conversion.workspace import LOCK, partial_dir
from qkit.errors import QkitError
from qkit.sources import open_source

FORMATS = ("compressed-tensors", "gptq", "gptq_v2")


def options(method: str) -> dict:
    return {"method": method, **(QUICK if method == "gptq" else {})}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-asym", "w8a16"])
def test_the_folder_is_complete_and_loads(llama, tmp_path, format, scheme):
    import qkit

    out = tmp_path / "out"
    result = convert(str(llama), out, format=format, scheme=scheme, method="rtn")
    assert sorted(p.name for p in out.iterdir() if p.name != "quantize_config.json") == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "qkit_manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    assert not partial_dir(out).exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = load_file(out / "model-00001-of-00001.safetensors")
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values()) == result.plan.bytes_out
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        expected = qkit.load(str(llama))(tokens).logits.float()
        got = qkit.load(str(out))(tokens).logits.float()
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if scheme == "w8a16" else 0.5)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_same_input_same_bytes_whatever_the_workers(llama, tmp_path, method):
    convert(str(llama), tmp_path / "a" / "out", **options(method))
    convert(str(llama), tmp_path / "b" / "out", max_memory=3 << 30, **options(method))
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_gptq_is_better_than_rtn_on_what_it_saw(llama, tmp_path):
    convert(str(llama), tmp_path / "gptq", method="gptq", **QUICK)
    manifest = json.loads((tmp_path / "gptq" / "qkit_manifest.json").read_text())
    assert len(manifest["tensors"]) == 14
    assert all(t["method"] == "gptq" and 0 < t["output_error"] < 1 for t in manifest["tensors"].values())
    assert manifest["identity"]["calibration"]["name"]


def test_an_export_keeps_every_value(llama, tmp_path):
    convert(str(llama), tmp_path / "out", format="safetensors")
    source, written = open_source(str(llama)), open_source(str(tmp_path / "out"))
    assert source.names() == written.names()
    assert all(torch.equal(source.read(n), written.read(n)) for n in source.names())
    assert "quantization_config" not in written.config


def test_dry_run_writes_nothing(llama, tmp_path):
    result = convert(str(llama), tmp_path / "out", dry_run=True)
    assert result.plan.bytes_out > 0 and result.plan.predicted.peak > 0
    assert list(tmp_path.iterdir()) == []


def test_converting_again_is_a_no_op_and_other_options_are_refused(llama, tmp_path):
    out = tmp_path / "out"
    convert(str(llama), out, method="rtn")
    before = contents(out)
    assert convert(str(llama), out, method="rtn").already_done
    with pytest.raises(QkitError, match="holds another conversion"):
        convert(str(llama), out, method="rtn", scheme="w8a16")
    assert contents(out) == before
    convert(str(llama), out, method="rtn", scheme="w8a16", restart=True)
    assert contents(out) != before and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_is_not_ours_is_never_touched(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(QkitError, match="was not written by qkit"):
            convert(str(llama), tmp_path / "out", method="rtn", restart=restart)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_non_finite_weights_are_named(llama, tmp_path, value, name, method):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QkitError, match=f"{name}.*(NaN|infinite|non-finite)"):
        convert(str(source), tmp_path / "out", **options(method))
    assert not (tmp_path / "out").exists()


def test_missing_blocks_are_refused_before_work(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if ".layers.1." not in n}, source / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(QkitError, match="block 1 are missing"):
        convert(str(source), tmp_path / "out", method="rtn")


def test_unknown_architecture_is_refused_only_by_methods_that_run_it(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "frobnicator", "architectures": ["FrobnicatorForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QkitError, match="frobnicator"):
        convert(str(source), tmp_path / "out", method="gptq", dry_run=True)
    convert(str(source), tmp_path / "out", method="rtn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "w5a16"}, "unknown scheme"),
        ({"format": "zip"}, "unknown format"),
        ({"method": "magic"}, "unknown method"),
        ({"group_size": 96}, "does not divide"),
        ({"skip": ["*.nothing"]}, "matches no tensor"),
        ({"scheme": "none"}, "do not go together"),
        ({"max_memory": 1 << 20}, "max-memory"),
        ({"calib": "x.txt", "method": "rtn"}, "not used"),
        ({"calib_samples": 0, "method": "gptq"}, "at least 1"),
    ],
)
def test_refusals_come_before_work(llama, tmp_path, changes, message):
    with pytest.raises(QkitError, match=message):
        convert(str(llama), tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(QkitError, match="are free there"):
        convert(str(llama), tmp_path / "out", method="rtn")


RUN = """
import sys
from qkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(source: Path, out: Path, method: str, limit: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, "convert", str(source), "-o", str(out), "--method", method]
    if method == "gptq":
        command += ["--calib-samples", "8", "--calib-len", "64"]

    def restrict() -> None:
        import resource

        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=restrict)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "larger", num_hidden_layers=4)


@pytest.mark.parametrize(
    ("method", "sig"), [("gptq", signal.SIGKILL), ("gptq", signal.SIGINT), ("rtn", signal.SIGTERM)]
)
def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(larger, tmp_path, method, sig):
    whole, out = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    run = start(larger, whole, method)
    assert run.wait() == 0, run.stderr.read()
    part = partial_dir(out)
    kills = 0
    # Kill when another block's file has appeared (gptq) or as soon as work has begun; then let it finish.
    for wanted in (1, 3) if method == "gptq" else (0, 0):
        run = start(larger, out, method)
        while run.poll() is None and not out.exists():
            if part.is_dir() and len(list(part.glob("model-*.safetensors"))) >= wanted:
                run.send_signal(sig)
                break
            time.sleep(0.002)
        code = run.wait()
        stderr = run.stderr.read()
        assert "Traceback" not in stderr
        # A run that was cut off before it could say anything (or was killed) ends by the signal itself.
        assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM), stderr
        kills += code != 0
        if code == 130:
            assert "the same command continues" in stderr
        assert out.exists() == (code == 0)
    assert kills > 0
    run = start(larger, out, method)
    assert run.wait() == 0, run.stderr.read()
    assert contents(out) == contents(whole)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX file size limits")
def test_full_disk_is_an_error_and_the_run_can_be_repeated(larger, tmp_path):
    out = tmp_path / "out"
    run = start(larger, out, "rtn", limit=100_000)
    assert run.wait() == 2
    stderr = run.stderr.read()
    assert "error:" in stderr and "hint:" in stderr and "Traceback" not in stderr
    assert not out.exists()
    assert not list(partial_dir(out).glob("*.safetensors"))
    run = start(larger, out, "rtn")
    assert run.wait() == 0, run.stderr.read()


def test_two_runs_at_once_do_not_mix(llama, tmp_path):
    import fcntl

    out = tmp_path / "out"
    partial_dir(out).mkdir()
    with open(partial_dir(out) / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(QkitError, match="another qkit convert"):
            convert(str(llama), out, method="rtn")
    convert(str(llama), out, method="rtn")
