"""The C++ matmul on every instruction set this machine has: as good as with weights that were not rounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qkit import kernels
from qkit.kernels import reference
from qkit.kernels.cpu import lib, matmul
from qkit.kernels.weight import TABLES, Weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# (out, in, group; 0: a row): blocks of 32 outputs and of 128 inputs that are full, ragged, several to a group; inputs
# that end within eight.
SHAPES = [
    (33, 512, 128),
    (7, 576, 64),
    (5, 192, 32),
    (9, 104, 0),
    (3, 144, 24),
    (65, 640, 320),
    (4, 8, 0),
    (40, 101, 0),
]
ROWS = (1, 3, 8, 13, 50, 95)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products by the thousand: waking a second thread for each would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def integers(out: int, in_: int, group: int, bits: int, symmetric: bool) -> Weight:
    gen = torch.Generator().manual_seed(out * in_)
    groups = in_ // group if group else 1
    codes = torch.randint(0, 1 << bits, (out, in_), dtype=torch.uint8, generator=gen)
    scale = (torch.rand(out, groups, generator=gen) * 0.02 + 0.01).to(FLOATS[in_ % 3])
    zero = None if symmetric else torch.randint(0, 1 << bits, (out, groups), dtype=torch.uint8, generator=gen)
    return Weight(kernels.pack(codes, bits), scale, zero, bits, in_)


def codebook(kind: str, out: int, in_: int, group: int) -> Weight:
    gen = torch.Generator().manual_seed(out * in_)
    groups = in_ // group if group else 1
    codes = torch.randint(0, 16, (out, in_), dtype=torch.uint8, generator=gen)
    scale = torch.rand(out, groups, generator=gen) * 0.02 + 0.01
    if kind == "mxfp4":
        scale = torch.randint(100, 140, scale.shape, generator=gen).to(torch.uint8)
    if kind == "nvfp4":
        scale = (scale * 100).to(torch.float8_e4m3fn)
    return Weight(kernels.pack(codes, 4), scale, None, 4, in_, kind, 1 / 300 if kind == "nvfp4" else 1.0)


def same(a: Weight, b: Weight) -> bool:
    scales = torch.equal(a.scale.contiguous().view(torch.uint8), b.scale.contiguous().view(torch.uint8))
    zeros = (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))
    return torch.equal(a.packed, b.packed) and scales and zeros and (a.kind, a.bits) == (b.kind, b.bits)


def check(w: Weight, isa: str, slack: float) -> None:
    """At most `slack` times the error of the same product with weights rounded to x's type."""
    state = matmul.prepack(w, None)
    assert same(matmul.restore(state), w)
    exact = reference.dequantize_weight(w, torch.float64)
    for dtype in FLOATS:
        for m in ROWS if w.out_features == 33 else (1, 8):
            x = torch.randn(m, w.in_features).to(dtype)
            bias = torch.randn(w.out_features).to(dtype) if m % 2 else None
            truth = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
            low = torch.nn.functional.linear(x, exact.to(dtype), bias).double()
            y = lib.matmul(state.c, x, bias, False, isa)
            assert y.shape == (m, w.out_features) and y.dtype == dtype
            # The last rounding alone is luck where few outputs are compared and the weights are exact in any type.
            luck = max(1e-6, torch.finfo(dtype).eps / 4) * truth.norm()
            error, bound = (y.double() - truth).norm(), slack * (low - truth).norm() + luck
            assert error <= bound, f"{isa} {dtype} m={m}: {float(error)} > {float(bound)}"


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_weights(isa: str, bits: int, symmetric: bool, shape: tuple[int, int, int]) -> None:
    check(integers(*shape, bits, symmetric), isa, 1.3)


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("shape", [(33, 512, 128), (9, 104, 0), (40, 96, 16)])
def test_codebooks(isa: str, kind: str, shape: tuple[int, int, int]) -> None:
    check(codebook(kind, *shape), isa, 1.5)  # the table itself may be rounded to bfloat16


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_activations_equal_the_oracle(isa: str, bits: int, symmetric: bool) -> None:
    for shape in SHAPES:
        w = integers(*shape, bits, symmetric)
        state = matmul.prepack(w, "int8")
        for m in (1, 13):
            x = torch.randn(m, w.in_features)
            x[m // 2] = 0
            bias = torch.randn(w.out_features)
            expected = reference.matmul(x, w, bias, "int8")
            error = lib.matmul(state.c, x, bias, True, isa) - expected
            assert error.norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("int8", [False, True])
def test_hard_activations(isa: str, int8: bool) -> None:
    """Nothing overflows or underflows, and what is not finite stays in its row, as NaN."""
    w = integers(40, 256, 128, 4, False)
    state = matmul.prepack(w, "int8" if int8 else None)
    exact = reference.dequantize_weight(w, torch.float64)
    for dtype in FLOATS:
        big = torch.finfo(dtype).max / 1e3
        x = torch.stack([torch.full((256,), v) for v in (0.0, 1e-6, big, torch.finfo(dtype).tiny)]).to(dtype)
        y = lib.matmul(state.c, x, None, int8, isa).double()
        truth = x.double() @ exact.T
        assert torch.isfinite(y[[0, 1, 3]]).all() and not y[0].any()
        assert torch.allclose(y[1], truth[1], rtol=0.02, atol=1e-9)
        fits = truth[2].abs() < torch.finfo(dtype).max
        assert torch.allclose(y[2][fits], truth[2][fits], rtol=0.02)
        assert (y[3] - truth[3]).abs().max() <= 1e-25 or dtype == torch.float16
        for poison in (float("nan"), float("inf")):
            x = torch.randn(5, 256).to(dtype)
            clean = lib.matmul(state.c, x, None, int8, isa)
            x[2, 17] = poison
            y = lib.matmul(state.c, x, None, int8, isa)
            assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ratio", [100, 1000, 60000])
def test_small_inputs_beside_a_large_one(isa: str, dtype: torch.dtype, ratio: int) -> None:
    """A weight of zero beside the largest input: the output is of the small ones alone, and as close as with weights
    that were rounded. Rows do not depend on whether another one is uneven."""
    w = integers(40, 512, 128, 4, True)
    codes = kernels.unpack(w.packed, 4, 512)
    codes[:, ::128] = 8
    w = Weight(kernels.pack(codes, 4), w.scale, None, 4, 512)
    state, exact = matmul.prepack(w, None), reference.dequantize_weight(w, torch.float64)
    x = torch.randn(5, 512).to(dtype)
    even = lib.matmul(state.c, x, None, False, isa)
    x[3] = 0.01 * torch.randn(512)
    x[3, ::128] = 0.01 * ratio
    y = lib.matmul(state.c, x, None, False, isa)
    truth = x[3].double() @ exact.T
    rounded = x[3].double() @ exact.to(dtype).double().T
    limit = 0.6 * torch.finfo(dtype).eps + ratio * 2**-23  # of rounding the output, and of three limbs
    allowed = 1.3 * (rounded - truth).norm() + limit * truth.norm()
    assert (y[3].double() - truth).norm() <= allowed
    assert torch.equal(y[[0, 1, 2, 4]], even[[0, 1, 2, 4]])


def test_threads_do_not_change_the_result() -> None:
    w = integers(257, 512, 128, 4, False)
    state = matmul.prepack(w, None)
    x = torch.randn(33, 512).bfloat16()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(lib.matmul(state.c, x, None))
    assert all(torch.equal(r, results[0]) for r in results)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A prompt processed whole or in pieces gives the same bits: of few rows, and of many, which AVX-512 BF16
    multiplies in another way."""
    state = matmul.prepack(integers(70, 384, 64, 4, True), None)
    for rows, piece in ((10, 5), (47, 12), (107, 53), (144, 48)):
        x = torch.randn(rows, 384).bfloat16()
        whole = lib.matmul(state.c, x, None)
        assert torch.equal(torch.cat([lib.matmul(state.c, part.contiguous(), None) for part in x.split(piece)]), whole)


def test_refusals() -> None:
    w = integers(4, 16, 8, 4, True)
    state = matmul.prepack(w, None)
    with pytest.raises(ValueError, match="takes 16 inputs"):
        matmul.matmul(torch.randn(2, 8), state, None)
    with pytest.raises(TypeError, match=r"float64 on cpu"):
        matmul.matmul(torch.randn(2, 16).double(), state, None)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        matmul.matmul(torch.randn(2, 16), state, torch.zeros(3))
    with pytest.raises(ValueError, match="'avx1024'"):
        lib.matmul(state.c, torch.randn(2, 16), None, False, "avx1024")


def test_noncontiguous_and_misaligned_inputs() -> None:
    w = integers(40, 64, 32, 4, True)
    state = matmul.prepack(w, None)
    x = torch.randn(5, 130)[:, 1:129:2]
    assert torch.equal(matmul.matmul(x, state, None), matmul.matmul(x.contiguous(), state, None))
    shifted = torch.empty(5 * 64 + 1)[1:].view(5, 64).copy_(x)
    assert shifted.data_ptr() % 16 and torch.equal(matmul.matmul(shifted, state, None), matmul.matmul(x, state, None))
    assert matmul.matmul(torch.empty(0, 64), state, None).shape == (0, 40)
    assert matmul.matmul(x[0], state, None).shape == (40,)
