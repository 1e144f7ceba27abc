"""Memory in a process of the model's own: the same whatever ran before, and a failure there is an answer."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qkit.hardware import detect
from qkit.measure import footprint, profile, speed

PROMPT = list(range(50, 250))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small Llama whose prefill takes tens of megabytes."""
    from models import make_model

    return str(make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=256, intermediate_size=2048))


def close(one: int, other: int) -> bool:
    return abs(one - other) <= max(0.1 * max(one, other), 2 << 20)


def test_a_model_takes_what_it_takes_whichever_is_measured_first(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GENERATED", 4)
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "_CEILING_BYTES", 1 << 20)
    result = profile(wide, baseline=wide, device="cpu", context=200, batch=[16], chunks=1, out=str(tmp_path / "r"))
    first, second = result.models[0].memory, result.baseline.memory
    assert first.problem is None and first.activations > 20 << 20
    assert close(first.activations, second.activations) and close(first.process, second.process)
    assert first.kv_cache == second.kv_cache == result.models[0].formula.kv_cache
    assert first.total == first.weights + first.kv_cache + first.activations + first.process


def test_it_does_not_depend_on_what_this_process_holds(wide):
    before = footprint.apart(wide, "cpu", PROMPT, 8, 0)
    held = torch.ones(64 << 20)
    after = footprint.apart(wide, "cpu", PROMPT, 8, 0)
    del held
    assert isinstance(before, footprint.Footprint) and isinstance(after, footprint.Footprint)
    assert close(before.activations, after.activations) and close(before.total, after.total)
    assert before.seen.startswith("peak resident memory") or before.seen.startswith("resident memory")


def test_an_error_in_the_process_is_an_answer(tmp_path):
    found = footprint.apart(str(tmp_path / "missing"), "cpu", PROMPT, 1, 0)
    assert isinstance(found, str) and found.startswith("QkitError: there is no ") and "\n" not in found


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ((-9, "", ""), "its process was ended by SIGKILL, as when memory runs out"),
        ((-11, "", "noise"), "its process was ended by SIGSEGV"),
        ((1, "", "Traceback\n  line\nImportError: x\n\n"), "its process failed with exit code 1: ImportError: x"),
        ((3, "", ""), "its process failed with exit code 3"),
        ((0, "", ""), "its process gave no answer"),
        ((0, "a library's words\n", ""), "its process gave no answer"),
        ((0, '{"kv_cache": 1}\n', ""), "its process gave no answer"),
        ((0, 'words\n{"problem": "no"}\n', ""), "no"),
    ],
)
def test_every_ending_has_words(monkeypatch, done, said):
    code, stdout, stderr = done
    answer = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(footprint.subprocess, "run", lambda *given, **named: answer)
    assert footprint.apart("m", "cpu", PROMPT, 1, 0) == said


def test_no_process_at_all(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert footprint.apart("m", "cpu", PROMPT, 1, 0).startswith("no process could be started: No such file")


def test_a_gpu_s_context_is_counted(monkeypatch):
    for name, value in {"synchronize": None, "empty_cache": None, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    device = SimpleNamespace(type="cuda")
    assert footprint._held(device, 1900) == 900  # 600 of it in no allocator's count
    assert footprint._held(device, 1100) == 300  # others gave memory back meanwhile: at least what torch counts


def test_the_request_is_on_stdin_and_the_same_qkit_is_found(monkeypatch):
    seen = {}

    def run(command, **named):
        seen.update(named, command=command)
        return subprocess.CompletedProcess(command, 0, '{"problem": "stop"}', "")

    monkeypatch.setattr(footprint.subprocess, "run", run)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    footprint.apart("--odd name", detect.cpu().id, PROMPT, 2, 5)
    assert seen["command"] == [sys.executable, "-m", "qkit.measure.footprint"] and "--odd name" in seen["input"]
    assert "" not in seen["env"]["PYTHONPATH"].split(":") and seen["env"]["PYTHONSAFEPATH"] == "1"
