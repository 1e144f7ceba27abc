"""Block decoders against the `gguf` package, bit for bit, on random bytes: every code and scale occurs."""

import numpy as np
import pytest
import torch

from qkit.errors import QkitError
from qkit.sources.gguf import ggml

gguf = pytest.importorskip("gguf")

ORACLE = gguf.GGMLQuantizationType
DECODED = [t for t in ggml.GGML_TYPES.values() if t.name in ggml.DECODERS]


def random_blocks(kind: ggml.GgmlType, blocks: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (blocks, kind.block_bytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = np.minimum(raw[:, 0], 254)
        raw[: min(3, blocks), 0] = np.arange(min(3, blocks))  # the subnormal exponents
        return raw
    # float16 scales: random bits, but finite, so that equality means something
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}.get(kind.name)
    at = at or ((0, 2) if kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,))
    for offset in at:
        raw[:, offset + 1] &= 0xBF
    return raw


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
@pytest.mark.parametrize("blocks", [1, 3, 257])
def test_decoders_equal_the_oracle(kind, blocks):
    raw = random_blocks(kind, blocks, seed=blocks)
    expected = gguf.quants.dequantize(raw, ORACLE[kind.name]).reshape(-1)
    out = torch.full((blocks * kind.block_size,), float("nan"))
    ggml.dequantize(torch.from_numpy(raw).view(-1), kind, out)
    assert torch.equal(out, torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
def test_chunks_and_rounding(kind, monkeypatch):
    """Chunked, into bf16: the same as one pass in float32, rounded once."""
    raw = torch.from_numpy(random_blocks(kind, 37, seed=5)).view(-1)
    whole = torch.empty(37 * kind.block_size)
    ggml.dequantize(raw, kind, whole)
    monkeypatch.setattr(ggml, "CHUNK", 4 * 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(37 * kind.block_size, dtype=dtype)
        ggml.dequantize(raw, kind, out)
        assert torch.equal(out, whole.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_plain_types(dtype):
    kind = next(t for t in ggml.GGML_TYPES.values() if t.plain and ggml._plain_dtype(t.plain) == dtype)
    values = torch.randn(77).to(dtype)
    out = torch.empty(77, dtype=torch.bfloat16)
    ggml.dequantize(values.view(torch.uint8), kind, out)
    assert torch.equal(out, values.to(torch.bfloat16))


def test_sizes_equal_the_oracle():
    ours = {number: (t.name, t.block_size, t.block_bytes) for number, t in ggml.GGML_TYPES.items()}
    # Q8_1 is never stored; the package still gives the size of an older layout.
    ours.pop(9)
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in ORACLE if int(t) in ours}
    assert ours == theirs | {k: v for k, v in ours.items() if k not in theirs}
    assert len(theirs) >= 30


def test_unreadable_types_are_refused_by_name():
    with pytest.raises(QkitError, match="IQ2_XXS") as caught:
        ggml.require_readable(ggml.GGML_TYPES[16], "blk.0.attn_q.weight")
    assert "Q4_K" in caught.value.hint and "blk.0.attn_q.weight" in caught.value.message
    assert "IQ2_XXS" not in ggml.readable_types() and "F64" in ggml.readable_types()
