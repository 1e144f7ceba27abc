"""Fits or not, against published logs and brute force; for all devices at once."""

from __future__ import annotations

import pytest
from shapes import shape

from qkit.errors import QkitError
from qkit.estimate.fit import BATCHES, CONTEXTS, fit, fit_all, largest, sizes_key
from qkit.estimate.serving import ENGINES, Serving
from qkit.estimate.weights import of_architecture
from qkit.hardware.catalogue import parse
from qkit.hardware.device import GIB, Device, Target


def card(gib: float, count: int = 1, **more) -> Target:
    given = {"vendor": "NVIDIA", "kind": "gpu", "capability": "8.9", **more}
    device = Device("card", "card", given.pop("vendor"), "", given.pop("kind"), (), gib, gib, 1000.0, **given)
    return Target(device, count)


def test_llama_8b_in_16_bits_on_24_gb():
    """vLLM's own log on an A10 with 0.9 of 22.07 GiB: 4.60 GiB and 37,696 tokens of cache (vLLM 0.7, whose profile
    did not try the sampler). With that the longest context is as far off as the two profiles are."""
    arch = shape("Llama-3.1-8B")
    found = fit(arch, of_architecture(arch), card(22.07), "vllm", 8192, serving=Serving(utilization=0.9, graphs=False))
    assert found.fits and found.problem == ""
    longest = found.largest_context(1)
    assert longest == pytest.approx(37_696, rel=0.13) and longest % 16 == 0
    assert not found.fits_at(longest + 1, 1) and found.fits_at(longest, 1)
    assert found.largest_context(2) == pytest.approx(longest / 2, abs=16)
    assert not fit(arch, of_architecture(arch), card(16.0), "vllm", 8192).fits


def test_qwen_32b_on_two_l40s():
    """The log of benchmarks/published/memory.csv: 63,152 tokens of cache beside 32.3 GiB."""
    arch = shape("Qwen2.5-32B")
    s = Serving(utilization=0.9, graphs=False, batched_tokens=10000, sequences=256, sampler_bytes=39)
    found = fit(arch, of_architecture(arch), card(44.42, 2), "vllm", 10000, serving=s)
    assert found.largest_context(1) == pytest.approx(63_152, rel=0.03)
    assert found.largest_batch(10000) == 6  # the log: a concurrency of 6.32
    assert not fit(arch, of_architecture(arch), card(44.42), "vllm", 1024, serving=s).fits


def test_70b_in_4_bits_on_80_gb():
    arch = shape("Llama-3.3-70B")
    weights = of_architecture(arch, "w4a16", "compressed-tensors")
    a100 = parse("a100-80g-sxm")[0]
    found = fit(arch, weights, a100, "vllm", 8192, 4)
    room = found.usable - found.memory.total + found.memory.of("KV cache")
    assert found.fits and found.largest_context(1) == room // (80 * 2 * 8 * 128 * 2) // 16 * 16
    assert found.largest_batch(8192) == room // (8192 * 80 * 2 * 8 * 128 * 2)
    assert not fit(arch, of_architecture(arch), a100, "vllm", 1).fits
    assert fit(arch, of_architecture(arch), Target(a100.device, 4), "vllm", 1).fits


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Gemma-3-270M", "DeepSeek-V2-Lite"])
def test_bisection_finds_what_brute_force_finds(name, engine):
    arch = shape(name, 3000)
    weights = of_architecture(arch, "w4a16", "compressed-tensors")
    base = fit(arch, weights, card(1.0), engine, 1).memory.total
    for more in (30 << 20, 200 << 20):
        share = {"vllm": 0.92, "llama.cpp": 0.9}.get(engine, 0.95)
        found = fit(arch, weights, card((base + more) / GIB / share), engine, 1)
        expected = max((n for n in range(1, 3001) if found.fits_at(n, 3)), default=None)
        assert found.largest_context(3) == expected
        expected = max((n for n in range(1, 400) if found.fits_at(777, n)), default=None)
        assert found.largest_batch(777) == expected or expected == 399


def test_largest():
    for most in (1, 2, 3, 7, 100):
        for limit in range(0, most + 3):
            expected = min(limit, most) or None
            assert largest(lambda n, limit=limit: n <= limit, most) == expected


def test_the_model_s_own_limit():
    arch = shape("Qwen2.5-0.5B", 4096)
    found = fit(arch, of_architecture(arch), card(80.0), "vllm", 4096)
    assert found.largest_context(1) == 4096 and not found.fits_at(4097, 1)
    with pytest.raises(QkitError, match="5,000 tokens is longer than the 4,096"):
        fit(arch, of_architecture(arch), card(80.0), "vllm", 5000)


def test_nothing_fits_and_nobody_knows():
    arch = shape("Llama-3.3-70B")
    found = fit(arch, of_architecture(arch), card(24.0), "vllm", 1)
    assert found.fits is False and found.largest_context() is None and found.largest_batch(1) is None
    assert found.spare == found.usable - found.memory.total < 0
    unknown = fit(arch, of_architecture(arch), parse("epyc-9654")[0], "llama.cpp", 1)
    assert unknown.fits is None and unknown.spare is None and unknown.largest_context() is None
    apple = fit(arch, of_architecture(arch), parse("m3-ultra-80c")[0], "vllm", 1)
    assert apple.fits is False and "Apple" in apple.problem and apple.largest_batch(1) is None


def test_the_grid_is_what_each_cell_says():
    arch = shape("Llama-3.1-8B")
    found = fit(arch, of_architecture(arch), parse("rtx-4090")[0], "vllm", 2048)
    grid = found.grid()
    assert len(grid) == len(CONTEXTS) and {len(row) for row in grid} == {len(BATCHES)}
    for context, row in zip(CONTEXTS, grid, strict=True):
        for batch, cell in zip(BATCHES, row, strict=True):
            assert cell == (batch <= (found.largest_batch(context) or 0)) == found.fits_at(context, batch)
    assert grid[0][0] and not grid[-1][-1]


def test_all_devices_are_answered_as_each_alone():
    arch = shape("Gemma-3-27B")
    weights = of_architecture(arch, "q4_k_m", "gguf")
    targets = (*parse("all"), *(Target(t.device, 2) for t in parse("all")[:20]))
    together = fit_all(arch, weights, targets, "llama.cpp", 8192, 2)
    assert [f.target for f in together] == list(targets)
    for found in together[::7]:
        alone = fit(arch, weights, found.target, "llama.cpp", 8192, 2)
        assert alone == found and alone.memory == found.memory
        assert alone.largest_context(2) == found.largest_context(2)
    assert {True, False, None} == {f.fits for f in together}


def test_targets_of_one_key_share_their_sizes():
    s = Serving()
    a, b, c = card(24.0), card(48.0), card(24.0, 2)
    assert sizes_key(a, "vllm", s) == sizes_key(b, "vllm", s) != sizes_key(c, "vllm", s)
    assert sizes_key(card(24.0), "llama.cpp", s) != sizes_key(card(24.0, kind="cpu"), "llama.cpp", s)
