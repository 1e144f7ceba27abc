"""Block decoders against the `gguf` package, bit for bit, on random bytes: every code and scale occurs. Encoders: C++
against torch, bit for bit; against the least error that a naive search finds; and fixed points."""

import numpy as np
import pytest
import torch

from qkit.errors import QkitError
from qkit.kernels import ggml
from qkit.kernels.cpu import lib
from qkit.kernels.errors import NonFiniteError, ScaleOverflowError
from qkit.kernels.ggml import GRIDS, assemble, encode, reference
from qkit.sources.gguf.model import require_readable
from qkit.spec.dtypes import torch_dtype
from qkit.spec.ggml import GGML, GgmlType

gguf = pytest.importorskip("gguf")

ORACLE = gguf.GGMLQuantizationType
DECODED = [t for t in ggml.GGML_TYPES.values() if t.name in ggml.DECODERS]


def random_blocks(kind: GgmlType, blocks: int, seed: int) -> np.ndarray:
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
    kind = next(t for t in ggml.GGML_TYPES.values() if t.plain and torch_dtype(t.plain) == dtype)
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
        require_readable(ggml.GGML_TYPES[16], "blk.0.attn_q.weight")
    assert "Q4_K" in caught.value.hint and "blk.0.attn_q.weight" in caught.value.message
    assert "IQ2_XXS" not in ggml.readable_types() and "F64" in ggml.readable_types()


# ---- encoders ----------------------------------------------------------------------------------------------------


def matrix(rows: int = 37, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """Rows of every kind: of all sizes, zero, tiny, with an outlier, of one sign, constant."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 1))
    x[1, 64:128], x[2] = 0, 0
    x[3, :256] *= 1e-6
    x[4, 0] = 300
    x[5], x[6] = x[5].abs(), -x[6].abs()
    x[7], x[8] = 1.5, -1.5
    return x


def decoded(raw: torch.Tensor, name: str, columns: int) -> torch.Tensor:
    out = torch.empty(len(raw) * columns)
    ggml.dequantize(raw.reshape(-1), GGML[name], out)
    return out.view(len(raw), columns)


IMPORTANCE = torch.rand(512, generator=torch.Generator().manual_seed(9)) + 0.05


@pytest.mark.parametrize("weight", [None, IMPORTANCE], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.skipif(not lib.isas(), reason="no CPU library")
def test_every_instruction_set_equals_the_reference(name, weight):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = matrix().to(dtype)
        expected = reference.fit(GRIDS[name], x, weight)
        for isa in lib.isas():
            found, lost, total = ggml.blocks(name, x, weight, isa)
            assert torch.equal(found, assemble(name, expected)), (isa, dtype)
            assert (lost, total) == pytest.approx((expected.lost, expected.total), rel=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rows, blocks", [(1, 1), (16, 3), (33, 11)])
@pytest.mark.skipif(not lib.isas(), reason="no CPU library")
def test_blocks_of_every_size_on_every_number_of_threads(name, rows, blocks):
    x = torch.randn(rows, blocks * GGML[name].block_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected, before = assemble(name, reference.fit(GRIDS[name], x, None)), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ggml.blocks(name, x, None)[0], expected), threads
    finally:
        torch.set_num_threads(before)


def random_fields(name: str, rows: int, columns: int) -> reference.Fields:
    grid, random = GRIDS[name], torch.Generator().manual_seed(4)
    count = len(grid.levels) or grid.high - grid.low + 1
    codes = torch.randint(0, count, (rows, columns), generator=random, dtype=torch.uint8)
    subs = columns // grid.sub
    d = torch.randn(rows, subs // grid.per_scale, generator=random)
    dmin = torch.randn(rows, subs // grid.per_scale, generator=random)
    least, most = grid.scales or (0, 0)
    integers = [torch.randint(low, most + 1, (rows, subs), generator=random).short() for low in (least, 0)]
    return reference.Fields(
        codes,
        (d.abs() * 20 + 90).short() if grid.power else d.half(),
        dmin.half() if grid.affine else None,
        integers[0] if grid.scales else None,
        integers[1] if grid.scales and grid.affine else None,
    )


@pytest.mark.parametrize("name", GRIDS)
def test_layout_against_the_oracle(name):
    """Random codes and scales, packed, are to the `gguf` package the values that they stand for."""
    grid, fields = GRIDS[name], random_fields(name, 7, 768)
    level = (
        fields.codes.float() + grid.low if not grid.levels else torch.tensor(grid.levels)[fields.codes.int()].float()
    )

    def spread(block, integers):
        block = torch.ldexp(torch.ones(block.shape), block.int() - 128) if grid.power else block.float()
        block = block.repeat_interleave(grid.per_scale, 1)
        return (block if integers is None else block * integers).repeat_interleave(grid.sub, 1)

    expected = level * spread(fields.d, fields.scales)
    if grid.affine:
        minimum = spread(fields.dmin, fields.minima)
        expected = expected - minimum if grid.scales else expected + minimum
    oracle = gguf.quants.dequantize(assemble(name, fields).numpy(), ORACLE[name])
    assert torch.equal(torch.from_numpy(np.ascontiguousarray(oracle)).view(7, 768), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "MXFP4", "IQ4_NL"])
def test_what_lies_on_the_grid_stays_as_it_is(name):
    values = decoded(encode(matrix(9, 512, seed=5)[4:], name), name, 512)
    again = decoded(encode(values, name), name, 512)
    error = (again - values).norm() / values.norm()
    assert float(error) < (1e-6 if name in ("MXFP4", "Q8_0") else 2e-3)


# What llama.cpp's own quantizers lose on the same matrix, without importances (ggml_quantize_chunk of llama.cpp as in
# llama-cpp-python 0.3.36, `benchmarks/gguf_quantize.py --errors`): the bound to stay below.
THEIRS = {
    "Q4_0": 0.08565, "Q4_1": 0.07827, "Q5_0": 0.04268, "Q5_1": 0.03783, "Q8_0": 0.00533, "Q2_K": 0.29709,
    "Q3_K": 0.15042, "Q4_K": 0.07154, "Q5_K": 0.03598, "Q6_K": 0.01769, "IQ4_NL": 0.07601, "IQ4_XS": 0.07661,
    "MXFP4": 0.11485,
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_no_more_is_lost_than_by_llama_cpp(name):
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    error = float((decoded(encode(x, name), name, 1024) - x).norm() / x.norm())
    assert error <= THEIRS[name] + 1e-5


@pytest.mark.parametrize("name", GRIDS)
def test_importance_moves_the_error_to_where_it_costs_little(name):
    x, weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), IMPORTANCE**4

    def lost(importance):
        return float(((decoded(encode(x, name, importance), name, 512) - x).square() * weight).sum())

    assert lost(weight) <= lost(None) * (1.0 + 1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_constant_and_empty_rows_are_kept(name):
    values = decoded(encode(matrix(), name), name, 512)
    assert torch.equal(values[2], torch.zeros(512))
    assert bool(torch.isfinite(values).all())
    for row in (7, 8):
        # a power of two is too coarse for 1.5, everything else has it, or a 6-bit fraction of it
        assert float((values[row].abs() - 1.5).abs().max()) < 0.01


def test_bad_input_is_refused():
    with pytest.raises(NonFiniteError):
        encode(torch.full((2, 32), float("nan")), "Q4_0")
    for value in (float("nan"), float("inf")):  # in one of many
        x = torch.ones(40, 512)
        x[37, 300] = value
        for name in GRIDS:
            with pytest.raises(NonFiniteError):
                encode(x, name)
    for name in GRIDS:
        with pytest.raises(ScaleOverflowError):
            encode(torch.full((2, 256), 1.1e9), name)
    with pytest.raises(ScaleOverflowError):
        encode(torch.full((2, 32), 3e38), "Q4_0")
    with pytest.raises(ScaleOverflowError):
        encode(torch.full((2, 256), 9e8), "Q4_K")
    with pytest.raises(ValueError, match="multiple of the 256"):
        encode(torch.ones(2, 96), "Q4_K")
    with pytest.raises(ValueError, match="not written here"):
        encode(torch.ones(2, 256), "TQ1_0")
    with pytest.raises(ValueError, match="importance"):
        encode(torch.ones(2, 256), "Q4_K", torch.ones(5))
