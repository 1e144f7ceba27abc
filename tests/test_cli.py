from __future__ import annotations

import importlib
import inspect as python_inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkit
from qkit.cli import COMMANDS, build_parser, main
from qkit.errors import QkitError


def test_help_imports_nothing_heavy():
    code = "import sys; from qkit.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\n" + (
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout and "profile" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_a_command_is_its_function(command):
    """Every argument of the function can be given on the command line, and nothing else."""
    module, _, name = command.function.partition(":")
    function = getattr(importlib.import_module(f"qkit.{module}"), name)
    argv = [command.name, *("M" for _ in command.inputs), *(["-o", "O"] if command.out else [])]
    given = vars(build_parser().parse_args(argv))
    bound = python_inspect.signature(function).bind(**{k: v for k, v in given.items() if k not in ("command", "json")})
    keywords = {n for n, p in python_inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == set(command.options.__dataclass_fields__) and not keywords & set(bound.arguments)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["convert"],
        ["convert", "nowhere/at/all", "-o", "out"],
        ["convert", "demo", "-o", "out", "--group-size", "many"],
        ["convert", "demo", "-o", "out", "--max-memory", "plenty"],
        ["frobnicate"],
        ["inspect", "/nonexistent.gguf"],
        ["inspect", "/"],
        ["profile", "/nonexistent"],
        ["profile"],
        ["convert", "demo"],
        ["convert", "demo", "-o", "out", "--group-size", "0.5"],
        ["convert", "demo", "-o", "out", "--max-memory", "0"],
        ["convert", "demo", "-o", "out", "--calib-samples", "none"],
        ["convert", "demo", "-o", "out", "--calib-len", "1"],
        ["convert", "demo", "-o", "out", "--calib", ""],
        ["convert", "demo", "-o", "out", "--scheme", "w3a16", "--dry-run"],
        ["convert", "demo", "-o", "out", "--format", "zip", "--dry-run"],
        ["convert", "demo", "-o", "out", "--method", "magic", "--dry-run"],
        ["convert", "demo", "-o", "out", "--device", "tpu", "--dry-run"],
        ["convert", "demo", "-o", "out", "--device", "cuda:99", "--dry-run"],
        ["convert", "demo", "-o", "out", "--max-memory", "1kB", "--dry-run"],
        ["convert", "", "-o", "out"],
        ["profile", "demo", "--batch", "0"],
        ["profile", "demo", "--context", "-5"],
        ["profile", "demo", "--max-kld", "nan", "--baseline", "demo"],
        ["profile", "demo", "--max-kld", "1"],
        ["profile", "demo", "--device", "tpu"],
        ["profile", "demo", "--context", "99999999"],
        ["profile", "demo", "--text", "missing.txt"],
        ["profile", ""],
        ["profile", "demo", "demo"],
        ["profile", "demo", "--max-memory", "much"],
        ["profile", "demo", "--max-memory", "1kB"],
        ["compare"],
        ["compare", "missing.json", "missing.json"],
        ["compare", "missing.json", "missing.json", "--max-slowdown", "fast"],
        ["inspect", ""],
        ["inspect"],
        ["inspect", "nowhere/at/all", "--verify"],
        ["inspect", "demo", "--verify"],
        ["inspect", "a\0b"],
        ["devices", "please"],
        ["devices", "--verify"],
    ],
)
def test_bad_input_is_two_lines_and_exit_2(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_convert_inspect_verify(llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(llama), "-o", str(out), "--method", "rtn", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "int4 symmetric g128" in plan and "bits per weight" in plan and "predicted" in plan
    assert main(["convert", str(llama), "-o", str(out), "--method", "rtn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_done"] is False
    assert main(["inspect", str(out), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == [] and facts["schemes"] == {"int4 symmetric g128": 14}
    assert facts["parameters"] == sum(p.numel() for p in qkit.load(str(llama)).parameters())
    assert main(["inspect", str(out), "--verify"]) == 0
    assert "every hash agrees" in capsys.readouterr().out
    with open(out / "model-00001-of-00001.safetensors", "r+b") as f:
        f.seek(-1, 2)
        byte = f.read(1)[0]
        f.seek(-1, 2)
        f.write(bytes([byte ^ 1]))
    assert main(["inspect", str(out), "--verify"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_public_names():
    for name in qkit.__all__:
        assert getattr(qkit, name) is not None
    assert callable(qkit.convert) and callable(qkit.load) and callable(qkit.profile)


@pytest.mark.parametrize("command", [["convert", "-o", "out", "--method", "gptq"], ["profile"]])
@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_a_checkpoint_needs_the_flag(command, trusted, llama, tmp_path, capsys, monkeypatch):
    def load_tokenizer(source, trust_remote_code=False):
        raise QkitError(f"trusted: {trust_remote_code}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qkit.runtime.load_tokenizer", load_tokenizer)
    monkeypatch.setattr("qkit.text.tokenizer.load_tokenizer", load_tokenizer)
    assert main([command[0], str(llama), *command[1:], *(["--trust-remote-code"] if trusted else [])]) == 2
    assert f"error: trusted: {trusted}" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--max-memory", "1TB"]])
def test_a_plan_counts_what_is_free(llama, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr("qkit.hardware.memory.available", lambda: (64 << 30, 1 << 20))
    monkeypatch.setattr("qkit.hardware.memory.resident", lambda: 200 << 20)
    assert main(["convert", str(llama), "-o", str(tmp_path / "o"), "--method", "rtn", "--dry-run", *more]) == 2
    assert "this process can have 210.8 MB" in capsys.readouterr().err


def test_an_unknown_option_names_its_command(capsys):
    assert main(["inspect", "demo", "--frobnicate"]) == 2
    assert capsys.readouterr().err == (
        "error: qkit inspect does not take --frobnicate\nhint: qkit inspect --help lists the options\n"
    )


@pytest.mark.parametrize("fault", [RuntimeError("boom"), KeyError("missing"), RecursionError(), OSError(5, "I/O")])
def test_no_traceback_reaches_a_user(fault, capsys, monkeypatch, tmp_path):
    def fail():
        raise fault

    monkeypatch.setattr("qkit.hardware.devices.devices", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["devices"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    first, second = captured.err.splitlines()
    assert first.startswith(f"error: internal error: {type(fault).__name__}") and second.startswith("hint: ")
    (file,) = tmp_path.iterdir()
    assert str(file) in second and "Traceback" in file.read_text() and "in fail" in file.read_text()


def test_no_place_for_the_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("qkit.hardware.devices.devices", lambda: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert main(["devices"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 2, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: out of memory"),
        (OSError(36, "File name too long", "abc"), 2, "error: abc: File name too long"),
        (PermissionError(13, "Permission denied", Path("abc")), 2, "error: abc: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_not_a_fault_of_qkit(error, code, words, capsys, monkeypatch):
    def fail():
        raise error

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("qkit.hardware.devices.devices", fail)
    try:
        assert main(["devices"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().err
    assert words in shown and "internal error" not in shown


def test_a_reader_that_leaves(tmp_path):
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from qkit.cli import main; sys.exit(main(['devices']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""
