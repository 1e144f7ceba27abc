"""The library as other compilers make it: GCC 11 (Ubuntu 22.04's), which lacks names of processor levels, and clang.
`make compilers` installs them."""

from __future__ import annotations

from pathlib import Path

import native
import pytest

from qkit.kernels.cpu import lib


@pytest.mark.parametrize("compiler", ["g++-11", "clang++"])
def test_another_compiler(tmp_path: Path, compiler: str) -> None:
    """Without a warning, with every level of this machine, and every kernel right."""
    driver = native.build(tmp_path, native.tool(compiler), "-DQKIT_WERROR=ON", "-DCMAKE_CXX_FLAGS=-O1 -DQKIT_FEW_TILES")
    levels, verdict = native.run(driver).splitlines()
    assert verdict == "ok"
    assert set(lib.isas()) <= {lib.ISAS[int(k)] for k in levels.split()[1:]}
