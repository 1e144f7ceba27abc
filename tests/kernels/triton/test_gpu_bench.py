"""The GPU benchmark's logic without a GPU: checks in the interpreter, turns and the report with made-up times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import gpu
from gpu_parts import checks

CHECKED = ("int4 g128 (128, 128) float16", "w8a8 fp8 g128 (128, 128)")


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no CUDA or ROCm device here: this benchmark checks and times the GPU that is present"
    ]


def test_checks_pass_in_the_interpreter(monkeypatch):
    every = list(checks.checks("cpu", small=True))
    some = [check for check in every if check[0].startswith(CHECKED)]
    assert len(some) == len(CHECKED)
    monkeypatch.setattr(checks, "checks", lambda device, small: some)
    result = gpu.check("cpu", gpu.Clock(600), small=True)
    assert result["cases"] == len(some) and not result["failed"] and result["worst_over_bound"] <= 1


def test_checks_report_what_is_wrong(monkeypatch):
    def broken() -> float:
        raise RuntimeError("cannot launch")

    some = [
        ("good", lambda: 1.0, 2.0),
        ("wrong", lambda: 3.0, 2.0),
        ("nan", lambda: float("nan"), 2.0),
        ("ill", broken, 2.0),
    ]
    monkeypatch.setattr(checks, "checks", lambda device, small: some)
    result = gpu.check("cpu", gpu.Clock(60))
    assert [fault.split(":")[0] for fault in result["failed"]] == ["wrong", "nan", "ill"]
    assert gpu.check("cpu", gpu.Clock(-1)) == {"cases": 0, "worst_over_bound": 0.0, "failed": [], "skipped": 4}


def test_turns_are_taken_until_time_is_up():
    order = []
    now = iter(range(100))
    clock = gpu.Clock(2, lambda: next(now))
    times = gpu.in_turns(
        {"a": lambda: "a", "b": lambda: "b"}, lambda run, n: order.append(run()) or [1.0] * n, 5, clock
    )
    assert "".join(order) == "ababab"  # three rounds of five
    assert len(times["a"]) == len(times["b"]) == 3 * gpu.CALLS


def test_report():
    top = {"read_bytes_per_s": 2e12, "copy_bytes_per_s": 1.8e12, "bf16_flops": 4e14}
    times = {"torch bfloat16": [2e-5, 2e-5, 4e-5], "qkit w4a16 g128": [1e-5, 9e-6, 1e-5]}
    sizes = {"torch bfloat16": 4096 * 4096 * 2, "qkit w4a16 g128": 4096 * 4096 // 2}
    rows = gpu.rows_for("8B o", (4096, 4096), 1, times, sizes, top)
    assert [row["speedup"] for row in rows] == [1.0, 2.0]
    assert rows[1]["of_bandwidth"] == pytest.approx((4096 * 4096 / 2 + 2 * 8192) / 1e-5 / 2e12)
    done = {"cases": 3, "worst_over_bound": 0.5, "failed": ["x: bad"], "skipped": 1}
    report = dict(device="Card", date="2026-01-01", command="c", versions={"qkit": "1"}, ceilings=top, checks=done)
    text = gpu.markdown(report | dict(rows=rows, absent={"marlin": "ImportError: vllm"}, left_out=["70B o"]))
    assert "read 2000 GB/s" in text and "1 failed" in text and "- marlin: ImportError: vllm" in text
    assert "| 1 | qkit w4a16 g128 | 10.0 us | 9.0 us | 840 | 42% | 1% | 2.00 |" in text


def test_checks_are_shared_out():
    """Each runs in one of the processes; what there is no time for is counted."""
    result = gpu.check("nowhere", gpu.Clock(600), small=True, workers=2)
    assert result["cases"] == len(list(checks.checks("cpu", True))) == len(result["failed"]) and not result["skipped"]
    assert all("nowhere" in fault for fault in result["failed"])


def test_tuning_keeps_what_was_fastest(monkeypatch, tmp_path):
    from qkit.kernels.triton import config, device, layout, tune

    monkeypatch.setattr(gpu, "SHAPES", {"o": (128, 4096)})
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    monkeypatch.setattr(layout.Packed, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(tune, "card", lambda where: device.Card("A Card", 4, (9, 0), False, True))
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, device: torch.empty(size))
    monkeypatch.setattr(checks, "make", lambda *about, make=checks.make: make(*about[:-1], "cpu"))
    monkeypatch.setattr(tune, "measure", lambda c, x, packed: 1.0 if c.stages == 6 or c.route == "dequantize" else 2.0)
    gpu.tune(gpu.Clock(60))
    kept = config.load(config.path_of("A Card"))["int4 g128 bfloat16 128x4096"]
    assert {m: (c.route, c.stages) for m, c in kept.items()} == {
        m: ("gemm", 6) if m <= 64 else ("dequantize", 0) for m in gpu.ROWS
    }


def test_needs_no_installation(tmp_path):
    """torch and triton on the path and a checkout: no installed qkit, nor a hook of site-packages that knows one."""
    for package in Path(torch.__file__).parents[1].iterdir():
        if "qkit" not in package.name:
            (tmp_path / package.name).symlink_to(package)
    script = f"""
import runpy, sys
sys.argv = ["gpu.py"]
try:
    runpy.run_path({gpu.__file__!r}, run_name="__main__")
except SystemExit as done:
    assert done.code == 2, done.code
import qkit.kernels.triton.ops, qkit.kernels.select
print(qkit.kernels.triton.__file__)
"""
    env = {name: value for name, value in os.environ.items() if name != "QKIT_DEV"} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", script]
    result = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == Path(gpu.__file__).parents[1] / "kernels/triton/__init__.py"
