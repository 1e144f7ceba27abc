"""The public functions: validation, both back ends behind one door, and what is said where C++ is missing."""

from __future__ import annotations

import logging
import zlib

import pytest
import torch

from qkit import kernels
from qkit.kernels import reference
from qkit.kernels.cpu import lib


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "load", lambda: "the library was not built")
    monkeypatch.setattr(kernels, "_warned", False)


def test_one_answer_from_both_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    w = (torch.randn(6, 96) * 0.1).bfloat16()

    def everything() -> list[torch.Tensor]:
        codes, scale, zero, *_ = kernels.quantize_rtn(w, 4, 32, False, "F16", 1)
        packed = kernels.pack(codes, 4)
        return [
            codes, scale, zero, packed, kernels.unpack(packed, 4, 96), kernels.pack_transposed(codes, 4),
            kernels.unpack_transposed(kernels.pack_transposed(codes, 4), 4),
            kernels.dequantize(packed, scale, zero, 4, 96, torch.bfloat16),
        ]  # fmt: skip

    native = everything()
    monkeypatch.setenv("QKIT_REFERENCE", "1")
    assert kernels.backend() == "torch reference (QKIT_REFERENCE=1)"
    assert all(torch.equal(a, b) for a, b in zip(native, everything(), strict=True))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 63, 64, 65, 127, 128, 1000, 1 << 16, (1 << 16) + 7])
def test_crc32_is_zlibs(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (n,), dtype=torch.uint8)
    for forced in ("0", "1"):
        monkeypatch.setenv("QKIT_REFERENCE", forced)
        assert kernels.crc32(data) == zlib.crc32(data.numpy())
        assert kernels.crc32(data.view(-1, 1).expand(n, 3)) == zlib.crc32(data.repeat_interleave(3).numpy())


def test_a_missing_library_is_said_once(no_library: None, caplog: pytest.LogCaptureFixture) -> None:
    assert kernels.backend() == "torch reference (the library was not built)"
    codes = torch.randint(0, 16, (3, 40), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, logger="qkit"):
        for _ in range(3):
            assert torch.equal(kernels.unpack(kernels.pack(codes, 4), 4, 40), codes)
    assert len(caplog.records) == 1
    assert "the library was not built" in caplog.text and "compiler" in caplog.text


def test_non_contiguous_tensors() -> None:
    codes = torch.randint(0, 16, (40, 8), dtype=torch.uint8)
    assert torch.equal(kernels.pack(codes.t(), 4), reference.pack(codes.t().contiguous(), 4))
    w = torch.randn(64, 8)
    assert torch.equal(
        kernels.quantize_rtn(w.t(), 4, 32, True, "F32")[0],
        kernels.quantize_rtn(w.t().contiguous(), 4, 32, True, "F32")[0],
    )


@pytest.mark.parametrize("back_end", ["library", "reference"])
def test_refusals(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if back_end == "reference":
        monkeypatch.setenv("QKIT_REFERENCE", "1")
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.ones(2, 1)
    with pytest.raises(ValueError, match="bits must be 4 or 8, not 3"):
        kernels.pack(codes, 3)
    with pytest.raises(TypeError, match="int64"):
        kernels.pack(codes.long(), 4)
    with pytest.raises(ValueError, match="two dimensions"):
        kernels.pack(codes[0], 4)
    with pytest.raises(ValueError, match="does not fit its bits"):
        kernels.pack(codes + 16, 4)
    with pytest.raises(ValueError, match="do not fill"):
        kernels.pack_transposed(codes[:, :7], 4)
    packed = kernels.pack(codes, 4)
    with pytest.raises(ValueError, match="take 5 words"):
        kernels.unpack(packed, 4, 33)
    with pytest.raises(ValueError, match=r"scale has shape \(3, 1\)"):
        kernels.dequantize(packed, torch.ones(3, 1), None, 4, 32, torch.float32)
    with pytest.raises(ValueError, match="zero has shape"):
        kernels.dequantize(packed, scale, torch.zeros(2, 2, dtype=torch.uint8), 4, 32, torch.float32)
    with pytest.raises(TypeError, match="int8"):
        kernels.dequantize(packed, scale, None, 4, 32, torch.int8)
    with pytest.raises(ValueError, match="out is"):
        kernels.dequantize(packed, scale, None, 4, 32, torch.float32, out=torch.empty(2, 31))
    w = torch.randn(2, 32)
    with pytest.raises(ValueError, match="does not divide 32"):
        kernels.quantize_rtn(w, 4, 24, True, "BF16")
    with pytest.raises(ValueError, match="F8"):
        kernels.quantize_rtn(w, 4, 32, True, "F8")
    with pytest.raises(ValueError, match="multipliers"):
        kernels.quantize_rtn(w, 4, 32, False, "BF16", multipliers=(-1.0,))
    for poison in (float("nan"), float("inf"), -float("inf")):
        w[1, 31] = poison
        with pytest.raises(kernels.NonFiniteError):
            kernels.quantize_rtn(w, 4, 16, True, "BF16")
    w[1, 31] = 1e6
    with pytest.raises(kernels.ScaleOverflowError):
        kernels.quantize_rtn(w, 4, 16, True, "F16")


def test_odd_groups_take_the_reference() -> None:
    """Groups of 15 begin in the middle of a byte, which the C++ kernel does not do: the answer is the same."""
    codes = torch.randint(0, 16, (3, 45), dtype=torch.uint8)
    scale = torch.rand(3, 3)
    got = kernels.dequantize(kernels.pack(codes, 4), scale, None, 4, 45, torch.float32)
    assert torch.equal(got, reference.dequantize(codes, scale, None, 4, torch.float32))
