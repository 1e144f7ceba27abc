"""What is probed here, and which device a name means."""

from __future__ import annotations

import json
import os

import pytest
import torch

from qkit.errors import QkitError
from qkit.hardware import detect, devices
from qkit.hardware.catalogue import catalogue


def test_this_machine_has_a_cpu():
    cpu = detect.present()[-1]
    assert cpu.id == cpu.kind == "cpu" and cpu.name and cpu.cores == len(os.sched_getaffinity(0))
    assert 0 < cpu.available_bytes <= cpu.memory_bytes


def test_json_and_text():
    both = devices.devices()
    parsed = json.loads(json.dumps(both.as_dict(), allow_nan=False))
    assert parsed["present"][-1]["id"] == "cpu" and len(parsed["catalogue"]) == len(catalogue())
    shown = devices.describe(both)
    assert all(d.id in shown for d in both.catalogue) and "cpu" in shown
    assert max(map(len, shown.splitlines())) <= 120
    row = next(d for d in parsed["catalogue"] if d["id"] == "h100-sxm")
    assert row["prices"][0]["usd_per_hour"] > 0 and row["sources"]["bandwidth_gbs"] and "fp8" in row["fast"]


def test_the_text_groups_by_vendor_and_marks_what_is_unverified():
    shown = devices.describe(devices.Devices((), catalogue()))
    titles = [line.split()[0] for line in shown.splitlines() if line.endswith(" W")]
    assert titles == ["AMD", "Apple", "Intel", "NVIDIA", "CPUs"]
    row = next(line for line in shown.splitlines() if line.startswith("  rtx-2000-ada "))
    assert row.split() == ["rtx-2000-ada", "RTX", "2000", "Ada", "16", "15.52", "224?", "48", "96", "96", "-", "70"]


@pytest.fixture
def two_gpus(monkeypatch):
    class Properties:
        name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0

    memory = int(79.2 * (1 << 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (memory // 2, memory))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "cuda:0"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("CPU", "cpu"),
        ("cpu", "cpu"),
        ("h100-sxm", "cuda:0"),
    ],
)
def test_names_of_devices(two_gpus, name, expected):
    assert detect.resolve(name).id == expected


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect.resolve("auto").id == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(QkitError, match=f"no device '{name}'") as caught:
            detect.resolve(name)
        assert "present: cpu (" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cuda:2", "cuda:-1", "mps", "cpu:0", "gpu"])
def test_what_is_not_here_is_refused(two_gpus, name):
    with pytest.raises(QkitError, match="no device") as caught:
        detect.resolve(name)
    assert "cuda:1 (NVIDIA H100" in (caught.value.hint or "") and "cpu (" in (caught.value.hint or "")


def test_a_catalogue_device_that_is_elsewhere():
    with pytest.raises(QkitError, match="not in this machine"):
        detect.resolve("mi300x")


def test_the_cpu_alone_touches_no_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: pytest.fail("a context was made on a GPU"))
    assert detect.resolve("cpu").id == "cpu"
