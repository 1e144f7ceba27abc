"""Builds the CPU library and its C++ test driver beside the installed one, with other options."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> str:
    """A program of this environment or of the system; skips the test where there is none."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path) -> str:
    """What the command printed; fails the test with all of it where the command fails."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def build(folder: Path, compiler: str, *options: str, link: str = "") -> Path:
    """Compiles library and driver in `folder` with CMake's `options`; returns the driver."""
    if sys.platform != "linux":
        pytest.skip("the driver is built on Linux only")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(
        tool("cmake"), "-S", ROOT, "-B", folder, *generator, f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", *options,
    )  # fmt: skip
    run(tool("cmake"), "--build", folder, "-j", str(os.cpu_count()))
    run(compiler, "-std=c++17", "-O2", "-c", ROOT / "tests/kernels/cpu_driver.cpp", "-o", folder / "driver.o")
    driver = folder / "driver"
    library = folder / "libqkit_cpu.so"
    run(compiler, *link.split(), folder / "driver.o", library, f"-Wl,-rpath,{folder}", "-o", driver)
    return driver
