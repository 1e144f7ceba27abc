"""The aarch64 kernels, cross-compiled and run in an emulator: NEON, dotprod and i8mm against plain loops."""

from __future__ import annotations

from pathlib import Path

import native


def test_every_arm_level(tmp_path: Path) -> None:
    """Needs g++-aarch64-linux-gnu and qemu-user."""
    compiler, emulator = native.tool("aarch64-linux-gnu-g++"), native.tool("qemu-aarch64")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    driver = native.build(tmp_path, compiler, *system)
    printed = native.run(emulator, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", driver)
    assert printed == "levels 0 7 8\nok\n"
