"""The device catalogue and what is probed here."""

from __future__ import annotations

import json
import os

import pytest

from qkit.errors import QkitError
from qkit.hardware import devices


def test_the_catalogue_is_complete_and_sane():
    rows = devices.catalogue()
    assert len(rows) >= 12 and len({d.id for d in rows}) == len(rows)
    for d in rows:
        assert d.source and d.name and d.id == d.id.lower()
        assert d.bandwidth_gbs and 30 < d.bandwidth_gbs < 20_000
        assert d.memory_gib is None or 4 <= d.memory_gib <= 1024
        if d.bf16_tflops_dense and d.fp8_tflops_dense:  # dense figures: fp8 is at most four times bf16
            assert 1 <= d.fp8_tflops_dense / d.bf16_tflops_dense <= 4


def test_this_machine_has_a_cpu():
    cpu = devices.present()[-1]
    assert cpu.id == "cpu" and cpu.name and cpu.cores == len(os.sched_getaffinity(0))
    assert 0 < cpu.available_bytes <= cpu.memory_bytes


def test_json_and_text():
    both = devices.devices()
    parsed = json.loads(json.dumps(both.as_dict(), allow_nan=False))
    assert parsed["present"][-1]["id"] == "cpu" and len(parsed["catalogue"]) == len(devices.catalogue())
    shown = devices.describe(both)
    assert all(d.id in shown for d in both.catalogue) and "cpu" in shown


@pytest.mark.parametrize(
    ("name", "gib", "capability", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "9.0", "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.6, "9.0", "h100-pcie"),
        ("NVIDIA H200", 139.8, "9.0", "h200-sxm"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "8.0", "a100-80g-sxm"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "8.0", "a100-40g-pcie"),
        ("NVIDIA GeForce RTX 4090", 23.6, "8.9", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, "8.9", None),
        ("Tesla T4", 14.6, "7.5", "t4"),
        ("NVIDIA L4", 22.0, "8.9", "l4"),
        ("NVIDIA L40S", 44.4, "8.9", "l40s"),
        ("NVIDIA GeForce GTX 1080", 8.0, "6.1", None),
    ],
)
def test_probed_names_find_their_row(name, gib, capability, expected):
    assert devices._match(name, int(gib * devices.GIB), capability) == expected


def test_cpu_names_find_their_row():
    assert devices._match("AMD EPYC 9654 96-Core Processor", None, None) == "epyc-9654"
    assert devices._match("Intel(R) Xeon(R) Platinum 8480+", None, None) == "xeon-8480plus"
    assert devices._match("AMD EPYC", None, None) is None


def test_choosing():
    assert devices.choose("cpu").id == "cpu"
    assert devices.choose("auto") == devices.present()[0] or devices.choose("auto").id == devices.present()[0].id
    with pytest.raises(QkitError, match="cannot predict yet") as caught:
        devices.choose("mi300x")
    assert "present: " in (caught.value.hint or "")
    with pytest.raises(QkitError, match="no device 'tpu'"):
        devices.choose("tpu")


@pytest.mark.parametrize("body", ["id,name\nx,y\n", "{header}\nx,n,v,a,many,1,1,1,1,1,,s\n", "{header}\nx,n\n"])
def test_a_malformed_catalogue(monkeypatch, tmp_path, body):
    header = ",".join(devices.Device.__dataclass_fields__)
    path = tmp_path / "devices.csv"
    path.write_text(body.replace("{header}", header))
    monkeypatch.setattr(devices, "_catalogue_path", lambda: path)
    devices.catalogue.cache_clear()
    try:
        with pytest.raises(QkitError, match="line 2"):
            devices.catalogue()
    finally:
        devices.catalogue.cache_clear()


def test_a_container_limit_counts(monkeypatch):
    from pathlib import Path

    files = {"/sys/fs/cgroup/memory.max": "1000000\n", "/sys/fs/cgroup/memory.current": "400000\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: files[str(self)])
    assert devices._memory() == (1_000_000, 600_000)
