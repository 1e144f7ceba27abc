"""The device catalogue: its figures against one another, and how names find their device."""

from __future__ import annotations

import pytest

from qkit.errors import QkitError
from qkit.hardware import catalogue
from qkit.hardware.catalogue import GIB, Target, find, parse
from qkit.hardware.device import FIGURES

DEVICES = catalogue.catalogue()
each = pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.id)

CAPABILITIES = {
    "Pascal": {"6.0", "6.1"}, "Volta": {"7.0"}, "Turing": {"7.5"}, "Ampere": {"8.0", "8.6", "8.7"}, "Ada": {"8.9"},
    "Hopper": {"9.0"}, "Blackwell": {"10.0", "11.0", "12.0", "12.1"}, "Blackwell Ultra": {"10.3"},
    "Vega 20": {"gfx906"}, "CDNA": {"gfx908"}, "CDNA2": {"gfx90a"}, "CDNA3": {"gfx942"}, "CDNA4": {"gfx950"},
    "RDNA2": {"gfx1030"}, "RDNA3": {"gfx1100", "gfx1101"}, "RDNA3.5": {"gfx1151"}, "RDNA4": {"gfx1200", "gfx1201"},
}  # fmt: skip
SLOW_FP16 = {"p40", "gtx-1080-ti"}  # GP102 computes fp16 at 1/64 of fp32
INT8_CUT = {"b300-sxm", "gb300"}  # Blackwell Ultra gave its int8 units up for fp4
# int8 over fp16, where it is not the usual 2.
INT8_OVER_FP16 = {
    **dict.fromkeys(("p40", "gtx-1080-ti"), 47 / 0.18),  # DP4A against fp16 at 1/64
    **dict.fromkeys(
        ("v100-16g-pcie", "v100-32g-pcie", "v100-16g-sxm", "v100-32g-sxm"), 0.5
    ),  # DP4A, no int8 tensor cores
    **dict.fromkeys(("mi100", "mi210", "mi250", "mi250x", "ryzen-ai-max-395"), 1),  # int8 as fast as fp16 there
    **dict.fromkeys(("rx-7800-xt", "rx-7900-gre", "rx-7900-xt", "rx-7900-xtx", "w7900"), 1),  # RDNA3's WMMA too
    "gb10": 4,  # halved like a GeForce
}


def geforce(device):
    """GeForce cards compute fp16 and fp8 with sums in fp32 at half the rate of other sums; int8 and fp4 at the full."""
    return device.name.startswith("GeForce RTX")


def test_there_are_enough_and_ids_are_unique():
    assert len(DEVICES) >= 110 and len({d.id for d in DEVICES}) == len(DEVICES)
    assert catalogue.catalogue() is DEVICES


@each
def test_a_device_is_found_by_each_of_its_names(device):
    for name in (device.id, device.name, *device.aliases):
        assert find(name) is device and find(f" {name.upper()} ") is device, name


@each
def test_every_figure_has_a_source(device):
    known = {name for name in FIGURES if getattr(device, name) is not None}
    assert known == set(device.sources) and "bandwidth_gbs" in known
    assert all(len(text) >= 8 for text in device.sources.values())
    assert set(device.unverified) <= known
    for price in device.prices:
        assert (price.usd is None) == (price.what == "rent") != (price.usd_per_hour is None)


def test_most_figures_were_seen_in_public():
    figures = sum(len(device.sources) for device in DEVICES)
    assert sum(len(device.unverified) for device in DEVICES) < 0.2 * figures


@each
def test_memory(device):
    assert 30 < device.bandwidth_gbs < 20_000
    if device.kind == "cpu":
        assert device.memory_gib is device.usable_gib is device.memory_bytes is None
        return
    assert 0.6 * device.memory_gib < device.usable_gib <= device.memory_gib
    assert device.memory_bytes == int(device.usable_gib * GIB)
    if device.memory_options_gib:
        assert device.memory_gib == max(device.memory_options_gib)


@each
def test_rates_agree_with_one_another(device):
    fp16, int8, fp8, fp4 = device.fp16_tflops, device.int8_tops, device.fp8_tflops, device.fp4_tflops
    if device.fp32_tflops and fp16 and device.id not in SLOW_FP16:
        assert fp16 >= device.fp32_tflops / 2
    if device.bf16_tflops and fp16 and device.kind != "cpu":
        assert device.bf16_tflops == pytest.approx(fp16 / 2 if device.id == "mi100" else fp16)
    if int8 and fp16 and device.kind != "cpu" and device.id not in INT8_CUT:
        expected = INT8_OVER_FP16.get(device.id, 4 if geforce(device) else 2)
        assert int8 / fp16 == pytest.approx(expected, rel=0.04)
    if int8 and fp8 and device.id not in INT8_CUT:
        assert int8 / fp8 == pytest.approx(2 if geforce(device) or device.id == "gb10" else 1, rel=0.01)
    if fp8 and fp4 and device.id not in INT8_CUT:
        assert fp4 / fp8 == pytest.approx(4 if geforce(device) or device.id == "gb10" else 2, rel=0.01)


@each
def test_what_the_architecture_has(device):
    if device.arch in CAPABILITIES and device.vendor in ("NVIDIA", "AMD"):
        assert device.capability in CAPABILITIES[device.arch]
    elif device.vendor == "Apple":
        assert device.capability == "metal"
    cc = device.compute_capability
    assert (cc is not None) == (device.vendor == "NVIDIA" and device.kind != "cpu")
    if cc:
        assert (device.fp8_tflops is not None) == (cc >= (8, 9))
        assert (device.fp4_tflops is not None) == (cc >= (10, 0))
        assert (device.bf16_tflops is not None) == (cc >= (8, 0))


# As a published table of measurements writes them, and drivers and people.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A100-80GB-SXM", "a100-80g-sxm"), ("RTX 4090", "rtx-4090"), ("H20-96GB", "h20-96g"),
        ("H100-80GB-SXM", "h100-sxm"), ("A100", "a100-80g-sxm"), ("H100", "h100-sxm"), ("RTX 3090 24GB", "rtx-3090"),
        ("RTX 4090 24GB", "rtx-4090"), ("L40S", "l40s"), ("H200-SXM", "h200-sxm"), ("RTX 4080 16GB", "rtx-4080"),
        ("RTX 3090", "rtx-3090"), ("RTX A6000", "rtx-a6000"), ("A100-80GB-SXM(330W)", "a100-80g-sxm"),
        ("CPU:Ryzen-7950X 16T", "ryzen-7950x"), ("Jetson AGX Orin", "jetson-agx-orin-64g"),
        ("CPU:Ryzen-7950X 2T", "ryzen-7950x"), ("B200", "b200-sxm"), ("RTX 3070 8GB", "rtx-3070"),
        ("RTX 3080 10GB", "rtx-3080"), ("RTX 3080 Ti 12GB", "rtx-3080-ti"), ("RTX 4070 Ti 12GB", "rtx-4070-ti"),
        ("T4 16GB", "t4"), ("A100 80GB PCIe/SXM n/s", "a100-80g-pcie"), ("H100 PCIe 80GB", "h100-pcie"),
        ("RTX 6000 Ada 48GB", "rtx-6000-ada"), ("RTX A6000 48GB", "rtx-a6000"), ("CPU:Neoverse-N2 64T", "yitian-710"),
        ("CPU:Xeon Granite Rapids 2T", "xeon-6980p"), ("RTX 4000 Ada 20GB", "rtx-4000-ada"),
        ("RTX 5000 Ada 32GB", "rtx-5000-ada"), ("rtx4090", "rtx-4090"), ("  h100_sxm ", "h100-sxm"),
        ("nvidia geforce rtx 3080", "rtx-3080"), ("RTX 3080 12GB", "rtx-3080-12g"), ("B200 192GB", "b200-sxm"),
        ("MI300X OAM", "mi300x"), ("7900XTX", "rx-7900-xtx"), ("NVIDIA GH200 480GB", "gh200-96g"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "i9-13900k"), ("AMD EPYC 9654 96-Core Processor", "epyc-9654"),
    ],
)  # fmt: skip
def test_names_of_others(name, expected):
    assert find(name).id == expected


@pytest.mark.parametrize(
    ("name", "expected", "gib", "usable"),
    [
        ("M2 Ultra 76c 192GB", "m2-ultra-76c", 192, 144),
        ("M3 Max 40c 64GB", "m3-max-40c", 64, 48),
        ("M1 Max 32c 64GB", "m1-max-32c", 64, 48),
        ("Apple M4 24 GB", "m4", 24, 16),
        ("Ryzen AI Max+ 395 64GB", "ryzen-ai-max-395", 64, 57.6),
        ("EPYC 9654 768GB", "epyc-9654", 768, 768),
    ],
)
def test_a_size_that_is_stated_is_taken(name, expected, gib, usable):
    device = find(name)
    assert (device.id, device.memory_gib, device.usable_gib) == (expected, gib, usable)
    assert parse(Target(device, 2).spec) == (Target(device, 2),)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("rtx-4900", "unknown device 'rtx-4900'", "rtx-4090"),
        ("h100-smx", "unknown device", "h100-sxm"),
        ("RTX 4080 Laptop", "unknown device", "rtx-4080"),
        ("CPU:AVX512 6T (Zen4-class)", "unknown device", "qkit devices"),
        ("", "unknown device ''", "my-card.json"),
        ("8xH100", "unknown device", "my-card.json"),
        ("RTX 4090 48GB", "'RTX 4090 48GB' is known with 24 GB, not with 48", "my-card.json"),
        ("M3 Max 40c 512GB", "is known with 48, 64, 128 GB, not with 512", "my-card.json"),
        ("A100 PCIe", "'A100 PCIe' can be a100-40g-pcie, a100-80g-pcie", "say which"),
    ],
)
def test_names_that_mean_none_or_several(name, message, hint):
    with pytest.raises(QkitError, match=message) as caught:
        find(name)
    assert hint in (caught.value.hint or "")


def test_what_a_target_is():
    (two,) = parse("h100-sxm:2")
    assert (two.device.id, two.count, two.spec) == ("h100-sxm", 2, "h100-sxm:2")
    assert parse("H100") == parse(["h100-sxm", "h100-sxm:1"]) and parse("H100")[0].spec == "h100-sxm"
    assert [t.device.id for t in parse(["RTX 3090 24GB:4", "rtx-4090"])] == ["rtx-3090", "rtx-4090"]
    assert [t.device for t in parse("all")] == list(DEVICES)
    assert {t.count for t in parse("ALL:8")} == {8}
    assert len(parse(["all", "t4"])) == len(DEVICES)


@pytest.mark.parametrize("spec", ["t4:0", "t4:65", "t4:1000", "t4:-1", "all:0", "my-card.json:0"])
def test_counts_that_no_machine_has(spec):
    with pytest.raises(QkitError, match=r"must be 1 to 64, is -?\d+"):
        parse(spec)


@pytest.mark.parametrize("spec", ["t4:two", "t4:", "cuda:1", ":2", "t4:1.5", "t4:2:2"])
def test_specs_that_name_no_device(spec):
    with pytest.raises(QkitError, match="unknown device"):
        parse(spec)


@pytest.mark.parametrize(
    ("name", "gib", "capability", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "9.0", "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.6, "9.0", "h100-pcie"),
        ("NVIDIA H100 NVL", 93.1, "9.0", "h100-nvl"),
        ("NVIDIA H200", 139.8, "9.0", "h200-sxm"),
        ("NVIDIA H20", 95.0, "9.0", "h20-96g"),
        ("NVIDIA H20", 139.7, "9.0", "h20-141g"),
        ("NVIDIA GH200 480GB", 94.6, "9.0", "gh200-96g"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "8.0", "a100-80g-sxm"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "8.0", "a100-40g-sxm"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "8.0", "a100-40g-pcie"),
        ("NVIDIA A100 80GB PCIe", 79.2, "8.0", "a100-80g-pcie"),
        ("Tesla V100-SXM2-32GB", 31.7, "7.0", "v100-32g-sxm"),
        ("NVIDIA GeForce RTX 4090", 23.6, "8.9", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", 47.4, "8.9", None),  # one with other memory chips
        ("NVIDIA GeForce RTX 4090", 23.6, "8.6", None),  # a name that lies
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, "8.9", "rtx-4090-laptop"),
        ("NVIDIA GeForce RTX 3080", 9.7, "8.6", "rtx-3080"),
        ("NVIDIA GeForce RTX 3080", 11.7, "8.6", "rtx-3080-12g"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 15.7, "8.6", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.9, "12.0", "rtx-pro-6000-server"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "8.9", "rtx-6000-ada"),
        ("Tesla T4", 14.6, "7.5", "t4"),
        ("NVIDIA L4", 22.0, "8.9", "l4"),
        ("NVIDIA L40S", 44.4, "8.9", "l40s"),
        ("NVIDIA B200", 178.4, "10.0", "b200-sxm"),
        ("NVIDIA GB10", 119.7, "12.1", "gb10"),
        ("Orin", 29.9, "8.7", "jetson-agx-orin-32g"),
        ("AMD Instinct MI300X", 192.0, None, "mi300x"),
        ("NVIDIA GeForce GTX 1080", 8.0, "6.1", None),
    ],
)
def test_probed_names_find_their_device(name, gib, capability, expected):
    assert catalogue.match(name, int(gib * GIB), capability) == expected


def test_cpu_names_find_their_device():
    assert catalogue.match("AMD EPYC 9654 96-Core Processor", None, None) == "epyc-9654"
    assert catalogue.match("Intel(R) Xeon(R) Platinum 8480+", None, None) == "xeon-8480+"
    assert catalogue.match("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", None, None) == "xeon-8380"
    assert catalogue.match("AMD EPYC", None, None) is None
