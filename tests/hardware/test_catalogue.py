"""The device catalogue, and how probed names find their rows in it."""

from __future__ import annotations

import pytest

from qkit.errors import QkitError
from qkit.hardware import catalogue


def test_the_catalogue_is_complete_and_sane():
    rows = catalogue.catalogue()
    assert len(rows) >= 12 and len({d.id for d in rows}) == len(rows)
    for d in rows:
        assert d.source and d.name and d.id == d.id.lower()
        assert d.bandwidth_gbs and 30 < d.bandwidth_gbs < 20_000
        assert d.memory_gib is None or 4 <= d.memory_gib <= 1024
        if d.bf16_tflops_dense and d.fp8_tflops_dense:  # dense figures: fp8 is at most four times bf16
            assert 1 <= d.fp8_tflops_dense / d.bf16_tflops_dense <= 4


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
    assert catalogue.match(name, int(gib * catalogue.GIB), capability) == expected


def test_cpu_names_find_their_row():
    assert catalogue.match("AMD EPYC 9654 96-Core Processor", None, None) == "epyc-9654"
    assert catalogue.match("Intel(R) Xeon(R) Platinum 8480+", None, None) == "xeon-8480plus"
    assert catalogue.match("AMD EPYC", None, None) is None


@pytest.mark.parametrize("body", ["id,name\nx,y\n", "{header}\nx,n,v,a,many,1,1,1,1,1,,s\n", "{header}\nx,n\n"])
def test_a_malformed_catalogue(monkeypatch, tmp_path, body):
    header = ",".join(catalogue.Device.__dataclass_fields__)
    path = tmp_path / "devices.csv"
    path.write_text(body.replace("{header}", header))
    monkeypatch.setattr(catalogue, "profile_path", lambda name: path)
    catalogue.catalogue.cache_clear()
    try:
        with pytest.raises(QkitError, match="line 2"):
            catalogue.catalogue()
    finally:
        catalogue.catalogue.cache_clear()
