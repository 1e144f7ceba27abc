"""Which formats are fast on which device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkit.hardware.catalogue import catalogue, fast_formats, find

MARLIN = {"w4a16", "w8a16", "fp8a16", "nvfp4a16"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("P40", {"bnb", "gguf"}),
        ("V100", {"bnb", "gguf"}),
        ("T4", {"bnb", "gguf", "w8a8", *MARLIN}),
        ("A100", {"bnb", "gguf", "w8a8", "mxfp4a16", *MARLIN}),
        ("RTX 4090", {"bnb", "gguf", "w8a8", "mxfp4a16", "fp8", *MARLIN}),
        ("H100", {"bnb", "gguf", "w8a8", "mxfp4a16", "fp8", *MARLIN}),
        ("B200", {"bnb", "gguf", "nvfp4", "mxfp4a16", "fp8", *MARLIN}),
        ("RTX 5090", {"bnb", "gguf", "nvfp4", "mxfp4a16", "fp8", *MARLIN}),
        ("MI250X", {"gguf"}),
        ("MI300X", {"gguf", "fp8"}),
        ("MI355X", {"gguf", "fp8", "mxfp4"}),
        ("RX 7900 XTX", {"gguf"}),
        ("RX 9070 XT", {"gguf", "fp8"}),
        ("M4 Max", {"gguf"}),
        ("Arc B580", {"gguf", "w4a16"}),
        ("Gaudi 3", {"fp8"}),
        ("EPYC 9654", {"gguf", "w4a16", "w8a16", "w8a8", "nvfp4a16", "mxfp4a16", "bnb"}),
        ("Graviton4", {"gguf", "w4a16", "w8a16", "nvfp4a16", "mxfp4a16", "bnb"}),
    ],
)
def test_kinds(name, expected):
    assert set(fast_formats(find(name))) == expected


def test_every_device_has_some_and_reasons_say_whose():
    for device in catalogue():
        found = fast_formats(device)
        assert found and all(len(reason) > 8 for reason in found.values()), device.id
    assert fast_formats(find("T4"))["w4a16"] == "Marlin, compute capability 7.5 (7.5 and later)"
    assert fast_formats(find("M4"))["gguf"] == "llama.cpp, Metal"


def test_nothing_is_claimed_for_a_card_of_an_unknown_vendor():
    assert fast_formats(replace(find("RTX 4090"), vendor="")) == {}
