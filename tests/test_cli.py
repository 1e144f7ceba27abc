from __future__ import annotations

import json
import subprocess
import sys

import pytest

import qkit
from qkit.cli import build_parser, main


def test_help_imports_nothing_heavy():
    code = "import sys; from qkit.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\n" + (
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout and "profile" in done.stdout


def test_defaults_are_those_of_the_functions():
    import inspect as python_inspect

    from qkit.conversion.run import convert
    from qkit.measure import profile

    for command, function, argv in (
        ("convert", convert, ["convert", "S", "-o", "O"]),
        ("profile", profile, ["profile", "M"]),
    ):
        args = vars(build_parser().parse_args(argv))
        for name, parameter in python_inspect.signature(function).parameters.items():
            if name in args and parameter.default is not parameter.empty:
                given = args[name]
                assert (tuple(given) if isinstance(given, list) else given) == parameter.default or (
                    not given and not parameter.default
                ), f"{command} {name}"


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
