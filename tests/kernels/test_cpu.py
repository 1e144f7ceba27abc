"""The C++ kernels against the torch reference: every instruction set this machine has, bit for bit."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit import kernels
from qkit.kernels import reference
from qkit.kernels.cpu import lib

# The levels above these differ in the matmul only.
ISAS = tuple(isa for isa in lib.isas() if isa not in ("avxvnni", "avx512vnni", "avx512bf16", "amx", "dotprod", "i8mm"))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Ragged on purpose: odd widths, groups that are not a multiple of sixteen, one row, one group.
SHAPES = [(5, 128, 32), (3, 120, 24), (7, 320, 64), (9, 1000, 0), (4, 33, 0), (1, 24, 0), (130, 48, 16), (2, 1, 0)]

pytestmark = pytest.mark.skipif(isinstance(lib.load(), str), reason=f"no CPU library: {lib.load()}")


def weight(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def equal(a: tuple, b: tuple) -> bool:
    """Codes, scales and zeros bit for bit; the sums of errors and squares exactly too."""
    zeros = a[2] is b[2] if a[2] is None or b[2] is None else torch.equal(a[2], b[2])
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and zeros and a[3:] == b[3:]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_exact(isa: str, bits: int, shape: tuple[int, int, int]) -> None:
    rows, n, _ = shape
    codes = torch.randint(0, 1 << bits, (rows, n), dtype=torch.uint8)
    packed = lib.pack(codes, bits, isa)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(lib.unpack(packed, bits, n, isa), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows,words", [(1, 1), (5, 3), (64, 64), (65, 63), (130, 129), (3, 200)])
def test_transposed_packing_is_exact(isa: str, bits: int, rows: int, words: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, words * 32 // bits), dtype=torch.uint8)
    packed = lib.pack_transposed(codes, bits, isa)
    assert torch.equal(packed, reference.pack(codes, bits).t())
    assert torch.equal(lib.unpack_transposed(packed, bits, isa), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_and_dequantize_are_exact(isa: str, bits: int, symmetric: bool, shape: tuple[int, int, int]) -> None:
    rows, cols, group_size = shape
    groups = cols // group_size if group_size else 1
    for dtype in FLOATS:
        w = weight(rows, cols, dtype)
        for scale_dtype in FLOATS:
            for min_zero in (0,) if symmetric else (0, 1):
                got = lib.quantize_rtn(w, bits, groups, symmetric, scale_dtype, min_zero, isa=isa)
                assert equal(got, reference.quantize_rtn(w, bits, groups, symmetric, scale_dtype, min_zero))
            codes, scale, zero = got[:3]
            filled = lib.dequantize(lib.pack(codes, bits, isa), scale, zero, bits, torch.empty_like(w), isa)
            assert torch.equal(filled, reference.dequantize(codes, scale, zero, bits, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_is_exact(isa: str, symmetric: bool) -> None:
    multipliers = (0.6, 0.8, 0.9, 1.1) + ((-1.0, -0.9) if symmetric else ())
    for shape in ((9, 256, 64), (5, 120, 24), (3, 600, 0)):
        w = weight(*shape[:2], torch.bfloat16)
        groups = shape[1] // shape[2] if shape[2] else 1
        for bits in (4, 8):
            args = (w, bits, groups, symmetric, torch.float16, 0, multipliers)
            assert equal(lib.quantize_rtn(*args, isa=isa), reference.quantize_rtn(*args))


# Groups of sixteen that break careless code: nothing but zeros, negative zeros, constants, subnormals, values at
# either end of the range, and a single huge value.
HARD_GROUPS = [
    [0.0] * 16,
    [-0.0] * 16,
    [0.0, -0.0] * 8,
    [1.5] * 16,
    [-1.5] * 16,
    [2.0, -2.0] * 8,
    [1e-41] * 16,
    [1e-45, -1e-45] * 8,
    [1e-38] * 15 + [-3e-38],
    [6e-8] * 16,
    [3e-5, -1e-5] * 8,
    [1e30] + [1e-30] * 15,
    [-3.3e38] + [1.0] * 15,
    [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 4.5, 5.5, 6.5, 7.5, -4.5, -5.5, -6.5, -8.0],
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hard_groups(isa: str, bits: int, symmetric: bool) -> None:
    w = torch.tensor(HARD_GROUPS)
    for dtype in (torch.float32, torch.bfloat16):
        for scale_dtype in (torch.float32, torch.bfloat16):
            for min_zero in (0, 1):
                args = (w.to(dtype), bits, 1, symmetric, scale_dtype, min_zero, (0.7, 1.05))
                got = lib.quantize_rtn(*args, isa=isa)
                assert equal(got, reference.quantize_rtn(*args))
                assert torch.isfinite(got[1]).all() and (got[1] != 0).all()
    narrow = w[w.abs().amax(1) < 1e4].half()
    args = (narrow, bits, 1, symmetric, torch.float16, 1)
    assert equal(lib.quantize_rtn(*args, isa=isa), reference.quantize_rtn(*args))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 0xFFFF), min_size=32, max_size=32),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from([4, 8]),
    st.sampled_from(ISAS or ("none",)),
)
def test_any_bit_pattern(
    halves: list[int], dtype: torch.dtype, scale_dtype: torch.dtype, symmetric: bool, bits: int, isa: str
) -> None:
    """Both paths give the same tensors or refuse with the same error, whatever the bits of the weight."""
    w = torch.tensor(halves, dtype=torch.uint16).view(dtype).view(2, 16)
    outcomes = []
    for run in (lib.quantize_rtn, reference.quantize_rtn):
        options = {"isa": isa} if run is lib.quantize_rtn else {}
        try:
            outcomes.append(run(w, bits, 1, symmetric, scale_dtype, 0, **options))
        except (kernels.NonFiniteError, kernels.ScaleOverflowError) as error:
            outcomes.append(type(error))
    native, torch_ = outcomes
    if isinstance(native, tuple) and isinstance(torch_, tuple):
        assert equal(native, torch_)
    else:
        # Rows are independent: with two different faults either may be named.
        assert not isinstance(native, tuple) and not isinstance(torch_, tuple)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_precision_value_converts_like_torch(isa: str) -> None:
    """All 65,536 float16 scales, and every code, through dequantize to every type (NaN and infinity included)."""
    scale = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(-1, 1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(1 << 16, 1)
    packed = lib.pack(codes, 4, isa)
    for dtype in FLOATS:
        got = lib.dequantize(packed, scale, None, 4, torch.empty(codes.shape, dtype=dtype), isa)
        expected = reference.dequantize(codes, scale, None, 4, dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


def test_the_asymmetric_grid_reaches_the_group_maximum() -> None:
    """With a least zero point of 1 an all-positive group keeps its maximum: the scale makes room for it."""
    w = torch.full((1, 16), 0.7)
    codes, scale, zero, *_ = kernels.quantize_rtn(w, 4, 16, False, "F32", min_zero=1)
    assert zero is not None and int(zero) == 1
    assert torch.allclose((codes - zero).float() * scale, w, rtol=1e-6)


def test_the_symmetric_grid_is_used_fully() -> None:
    """The weight of largest magnitude lands on code 0, whatever its sign."""
    for sign in (1.0, -1.0):
        w = torch.linspace(-0.9, 0.9, 16).view(1, 16).clone()
        w[0, 3] = sign
        codes, scale, _, *_ = kernels.quantize_rtn(w, 4, 16, True, "F32")
        assert int(codes[0, 3]) == 0 and float(scale) == -sign / 8


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    w = weight(700, 512, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(kernels.quantize_rtn(w, 4, 128, False, "BF16"))
    finally:
        torch.set_num_threads(before)
    assert equal(*results)


def test_calls_from_many_threads() -> None:
    w = weight(400, 512, torch.bfloat16)
    expected = kernels.quantize_rtn(w, 4, 64, True, "BF16")
    wrong: list[int] = []

    def run(k: int) -> None:
        for _ in range(10):
            if not equal(kernels.quantize_rtn(w, 4, 64, True, "BF16"), expected):
                wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def _digest(codes: torch.Tensor) -> str:
    return hashlib.sha256(lib.pack(codes, 4).numpy().tobytes()).hexdigest()


def _in_child(queue: multiprocessing.SimpleQueue, codes: torch.Tensor) -> None:
    queue.put(_digest(codes))  # no torch operator here: OpenMP itself does not survive a fork


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork()")
def test_works_after_fork() -> None:
    codes = torch.randint(0, 16, (2000, 256), dtype=torch.uint8)
    expected = _digest(codes)  # the parent's pool exists by now
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, codes))
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive, "the child hangs"
    assert queue.get() == expected


def test_the_library_checks_for_itself() -> None:
    """The C ABI refuses what Python let through, by code."""
    library = lib.load()
    assert not isinstance(library, str)
    buffer = torch.zeros(64, dtype=torch.int32)
    p = buffer.data_ptr()
    assert library.qk_pack(p, p, 1, 8, 5, 0, 1) == 1
    assert library.qk_pack(p, p, -1, 8, 4, 0, 1) == 2
    assert library.qk_pack(None, p, 1, 8, 4, 0, 1) == 3
    assert library.qk_pack(p, p, 1, 8, 4, 17, 1) == 5
    assert library.qk_pack_transposed(p, p, 1, 7, 4, 0, 1) == 2
    assert library.qk_dequantize(p, p, 9, None, p, 0, 1, 8, 1, 4, 0, 1) == 4
    assert library.qk_dequantize(p, p, 0, None, p, 0, 1, 8, 3, 4, 0, 1) == 2
    assert library.qk_prepack(p, None, 1, 8, 4, 1) == 3
    assert library.qk_prepacked_bytes(1, 8, 5) == -1
    assert library.qk_restore(p, p, 0, 8, 4, 1) == 2

    def matmul(x: int | None = p, dtype: int = 0, m: int = 1, int8: int = 0, isa: int = 0, **fields: object) -> int:
        weight = dict(codes=p, scale=p, zero=None, table=None, rows=1, cols=8, groups=1, bits=4, scale_dtype=0)
        c = lib.QkWeight(**{**weight, **fields})
        return library.qk_matmul(ctypes.addressof(c), x, dtype, None, p, m, int8, isa, 1)

    assert matmul() == matmul(m=0, x=None) == 0
    assert matmul(bits=5) == matmul(table=p, int8=1) == matmul(table=p, zero=p) == 1
    assert matmul(rows=0) == matmul(m=-1) == matmul(groups=3) == matmul(groups=2) == 2
    assert matmul(x=None) == matmul(codes=None) == library.qk_matmul(None, p, 0, None, p, 1, 0, 0, 1) == 3
    assert matmul(dtype=3) == matmul(scale_dtype=-1) == 4
    assert matmul(isa=17) == 5
