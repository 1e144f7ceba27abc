"""Memory figures: containers of both versions, nested groups, the process's own peak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qkit.hardware import memory

TOTAL, FREE = 64 << 30, 50 << 30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 64 GiB, 50 of them free; `machine(cgroup, mountinfo, groups)` puts this process into groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=TOTAL, available=FREE))
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")

    def build(cgroup: str, mountinfo: str, groups: dict[str, dict[str, str]]) -> None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cgroup").write_text(cgroup)
        (tmp_path / "proc" / "mountinfo").write_text(mountinfo.replace("TOP", str(tmp_path / "sys")))
        for folder, files in groups.items():
            place = Path(tmp_path, "sys", folder)
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_text(content + "\n")

    return build


V2 = "30 20 0:26 / TOP rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"
V1 = "36 25 0:33 {root} TOP ro,nosuid master:19 - cgroup cgroup rw,memory\n"
GIB = 1 << 30


def v2(limit: str, used: int, cached: int = 0, high: str = "max") -> dict[str, str]:
    statistics = f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\nactive_file 0"
    return {"memory.max": limit, "memory.high": high, "memory.current": str(used), "memory.stat": statistics}


def v1(limit: int, used: int, cached: int = 0) -> dict[str, str]:
    statistics = f"cache {cached}\ntotal_inactive_file {cached // 2}\ntotal_active_file {cached - cached // 2}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": statistics}


def test_no_groups(machine):
    machine("", "", {})
    assert memory.available() == (TOTAL, FREE)


def test_no_proc_at_all(machine):
    assert memory.available() == (TOTAL, FREE)


def test_a_container_of_version_2(machine):
    machine("0::/\n", V2, {"": v2(str(8 * GIB), 3 * GIB)})
    assert memory.available() == (8 * GIB, 5 * GIB)


def test_cached_files_count_as_free(machine):
    machine("0::/\n", V2, {"": v2(str(8 * GIB), 7 * GIB, cached=4 * GIB)})
    assert memory.available() == (8 * GIB, 5 * GIB)


def test_unlimited(machine):
    machine("0::/a\n", V2, {"": {}, "a": v2("max", GIB)})
    assert memory.available() == (TOTAL, FREE)


def test_the_tightest_of_nested_groups_counts(machine):
    inner, outer = v2("max", GIB), v2(str(10 * GIB), 8 * GIB)
    machine(
        "0::/slice/service/job\n",
        V2,
        {"slice": outer, "slice/service": v2(str(9 * GIB), GIB), "slice/service/job": inner},
    )
    assert memory.available() == (9 * GIB, 2 * GIB)  # the service's limit, and what its slice has left


def test_a_soft_limit_counts(machine):
    machine("0::/\n", V2, {"": v2("max", GIB, high=str(4 * GIB))})
    assert memory.available() == (4 * GIB, 3 * GIB)


@pytest.mark.parametrize("root", ["/", "/docker/123"])
def test_a_container_of_version_1(machine, root):
    folder = "" if root != "/" else "docker/123"
    unlimited = v1(9223372036854771712, 20 * GIB)
    machine(
        "11:cpu:/docker/123\n7:memory:/docker/123\n",
        V1.format(root=root),
        {"": unlimited, folder: v1(6 * GIB, 4 * GIB, cached=GIB)},
    )
    assert memory.available() == (6 * GIB, 3 * GIB)


def test_a_path_outside_what_is_mounted(machine):
    machine("0::/../../other\n", V2, {"": v2(str(8 * GIB), 2 * GIB)})
    assert memory.available() == (8 * GIB, 6 * GIB)


def test_a_group_that_is_full_leaves_nothing(machine):
    machine("0::/\n", V2, {"": v2(str(GIB), 2 * GIB)})
    assert memory.available() == (GIB, 0)


def test_a_process_may_plan_for_what_it_holds_and_what_is_free(machine):
    machine("0::/\n", V2, {"": v2(str(8 * GIB), 3 * GIB)})
    assert abs(memory.limit() - 5 * GIB - memory.resident()) < 16 << 20


def test_here():
    total, free = memory.available()
    assert 0 < free <= total <= psutil.virtual_memory().total
    assert 0 < memory.resident() <= memory.limit()


@pytest.mark.skipif(sys.platform != "linux", reason="clear_refs is Linux's")
def test_the_peak_can_be_reset():
    code = """
from qkit.hardware import memory
held = bytearray(200 << 20); held[::4096] = b'x' * len(held[::4096])
high = memory.peak_resident(); del held
assert high > 200 << 20
if memory.reset_peak():
    assert memory.peak_resident() < high - (150 << 20)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
