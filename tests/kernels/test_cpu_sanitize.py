"""The C ABI under the address and undefined-behaviour sanitizers, the kernels against guard pages."""

from __future__ import annotations

import platform
from pathlib import Path

import native
import pytest

from qkit.kernels.cpu import lib


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no levels here")
def test_every_level(tmp_path: Path) -> None:
    """On x86 with AMX and AVX-VNNI computed in plain C: their levels run wherever what they build on does."""
    driver = native.build(
        tmp_path, native.tool("g++"), "-DQKIT_SANITIZE=ON", "-DQKIT_EMULATE=ON", link="-fsanitize=address,undefined"
    )  # fmt: skip
    levels, verdict = native.run(driver).splitlines()
    assert verdict == "ok"
    ran = [lib.ISAS[int(k)] for k in levels.split()[1:]]
    assert set(lib.isas()) <= set(ran)
    assert ("avx2" in ran) == ("avxvnni" in ran) and ("avx512bf16" in ran) == ("amx" in ran)
