"""The Triton kernels with the Triton that torch 2.11 brings, where constraints.txt has the newest: computed in its
interpreter, and compiled for the cards of today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interop import clients

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def older() -> dict[str, str]:
    """What a process needs to import the older Triton in the place of ours."""
    alone = clients.once(clients.alone)
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = (str(alone(clients.TRITON)), str(alone(clients.NUMPY)), env.get("PYTHONPATH"))
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    version = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=env, capture_output=True, text=True
    )
    assert version.stdout.strip() == clients.TRITON.split("==")[1], version.stderr
    return env


def test_the_interpreter_computes_the_same(older) -> None:
    tests = [str(ROOT / "tests/kernels/triton" / name) for name in ("test_linear.py", "test_w8a8.py")]
    chosen = "products or rounds_once or finite or codes or matmul"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    result = subprocess.run(command, env=older, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_it_compiles_without_spills(older, target: str) -> None:
    """Every kind of weight in both types of activations, as `config.rule` launches it."""
    command = [sys.executable, str(ROOT / "benchmarks/triton_static.py"), "--check", "--gates", "--rows", "16,64"]
    result = subprocess.run([*command, "--targets", target], env=older, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
