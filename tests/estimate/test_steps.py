"""The next step down, and the best scheme that fits."""

from __future__ import annotations

import pytest
from shapes import shape

from qkit.errors import QkitError
from qkit.estimate.fit import fit
from qkit.estimate.steps import LADDERS, Formats, best_scheme, engine_of, small_cache, steps_down
from qkit.estimate.weights import of_architecture
from qkit.formats import FORMATS
from qkit.hardware.catalogue import parse
from qkit.hardware.device import GIB, Device, Target
from qkit.spec import PRESETS


def card(gib: float, **more) -> Target:
    given = {"vendor": "NVIDIA", "kind": "gpu", "capability": "8.9", **more}
    device = Device("card", "card", given.pop("vendor"), "", given.pop("kind"), (), gib, gib, 1000.0, **given)
    return Target(device)


def test_what_a_70b_can_do_on_one_card():
    arch = shape("Llama-3.3-70B")
    steps = {step.name: step for step in steps_down(arch, parse("h100-sxm")[0], 16384)}
    assert not steps["compressed-tensors fp8"].fit.fits
    assert steps["compressed-tensors w4a16"].fit.fits
    q4 = steps["gguf q4_k_m"]
    assert q4.fit.fits and q4.fit.engine == "llama.cpp" and q4.largest_batch >= 1
    assert q4.nbytes == of_architecture(arch, "q4_k_m", "gguf").total
    assert q4.largest_context == fit(
        arch, of_architecture(arch, "q4_k_m", "gguf"), parse("h100-sxm")[0], "llama.cpp", 16384
    ).largest_context(1)
    half = steps["compressed-tensors w4a16 with an F8_E4M3 cache"]
    assert half.largest_batch == pytest.approx(2 * steps["compressed-tensors w4a16"].largest_batch, abs=1)
    assert "16 bits with an F8_E4M3 cache" in steps and not steps["16 bits with an F8_E4M3 cache"].fit.fits


def test_steps_are_those_a_device_is_fast_at():
    arch = shape("Qwen3-8B")

    def named(device: str) -> set[str]:
        return {step.name.partition(" with")[0] for step in steps_down(arch, parse(device)[0], 4096)}

    assert "compressed-tensors w8a16" in named("a100-80g-sxm") and "compressed-tensors fp8" not in named("a100-80g-sxm")
    assert "compressed-tensors fp8" in named("rtx-4090") and "compressed-tensors w8a16" not in named("rtx-4090")
    assert {name.partition(" ")[0] for name in named("m3-max-40c")} == {"gguf"}


def test_what_is_not_smaller_is_no_step_down():
    arch = shape("Qwen3-8B")
    now = ("gguf", "q4_k_m")
    before = of_architecture(arch, "q4_k_m", "gguf").total
    steps = steps_down(arch, parse("rtx-4090")[0], 4096, now=now)
    assert {step.name for step in steps if step.nbytes >= before} == {"gguf q4_k_m with an Q8_0 cache"}
    assert [step.name for step in steps if step.kv_dtype is None] == ["gguf iq4_xs", "gguf q3_k_m", "gguf q2_k"]


def test_weights_of_a_format_are_computed_once():
    known = Formats(shape("Qwen3-8B"))
    assert known.weights("gguf", "q4_k_m") is known.weights("gguf", "q4_k_m")
    with pytest.raises(QkitError, match="does not hold"):
        known.weights("bnb", "w4a16")


def test_ladders_go_down_in_bytes_and_name_what_is_written():
    known = Formats(shape("Llama-3.1-8B"))
    for format, ladder in LADDERS.items():
        assert format in FORMATS and set(ladder) <= set(PRESETS)
        if format != "mxfp4":  # whose only users have experts
            sizes = [known.weights(format, scheme).total for scheme in ladder]
            assert sizes == sorted(sizes, reverse=True), format


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "bnb", "gguf"])
def test_each_scheme_of_a_ladder_is_chosen_where_the_next_larger_does_not_fit(format):
    arch = shape("Qwen3-8B")
    ladder = LADDERS[format]
    engine = engine_of(format, card(80.0).device)
    share = {"vllm": 0.92, "transformers": 0.95, "llama.cpp": 0.9}[engine]
    needs = [
        fit(arch, of_architecture(arch, scheme, format), card(8.0), engine, 2048, 2).memory.total for scheme in ladder
    ]
    for scheme, need in zip(ladder, needs, strict=True):
        choice = best_scheme(arch, card((need + 4096) / GIB / share), 2048, 2, format)
        assert choice.scheme == scheme and choice.fit.memory.total == need
        assert [name for name, _ in choice.larger] == list(ladder[: ladder.index(scheme)])
        assert all(name in choice.words for name in (scheme, format, engine, "2 x 2,048 tokens"))
    with pytest.raises(QkitError, match=f"no scheme of {format} fits card: {ladder[-1]}, the smallest, needs"):
        best_scheme(arch, card((needs[-1] - (64 << 20)) / GIB / share), 2048, 2, format)


def test_eight_bits_are_fp8_where_the_device_multiplies_it():
    arch = shape("Qwen3-8B")
    assert best_scheme(arch, card(80.0), 2048, 1, "compressed-tensors").scheme == "fp8"
    assert best_scheme(arch, card(80.0, capability="8.0"), 2048, 1, "compressed-tensors").scheme == "w8a16"
    assert best_scheme(arch, card(80.0, vendor="", capability=""), 2048, 1, "compressed-tensors").scheme == "w8a16"


def test_no_more_bits_than_the_source_has():
    arch = shape("Qwen3-8B")
    assert best_scheme(arch, card(80.0), 2048, 1, "gptq", most_bits=4).scheme == "w4a16"
    with pytest.raises(QkitError, match="no scheme of 3 bits or fewer"):
        best_scheme(shape("gpt-oss-20b"), card(80.0), 2048, 1, "compressed-tensors", most_bits=3)


def test_what_would_be_needed_is_said():
    arch = shape("Llama-3.3-70B")
    with pytest.raises(QkitError) as error:
        best_scheme(arch, card(48.0), 131072, 1, "compressed-tensors")
    assert "--context " in error.value.hint and "--fit card:2" in error.value.hint
    longest = int(error.value.hint.partition("--context ")[2].partition(",")[0])
    assert best_scheme(arch, card(48.0), longest, 1, "compressed-tensors").scheme == "w4a16"
    with pytest.raises(QkitError):
        best_scheme(arch, card(48.0), longest + 16, 1, "compressed-tensors")
    with pytest.raises(QkitError) as error:
        best_scheme(arch, card(32.0), 4096, 1, "compressed-tensors")
    assert "--format gguf (q3_k" in error.value.hint
    with pytest.raises(QkitError, match=r"memory of .* is not known") as error:
        best_scheme(arch, parse("epyc-9654")[0], 4096, 1, "gguf")
    assert "256GB" in error.value.hint
    with pytest.raises(QkitError, match="no schemes to choose from"):
        best_scheme(arch, card(80.0), 4096, 1, "safetensors")


def test_the_engine_of_a_format():
    cpu = card(64.0, kind="cpu", vendor="AMD").device
    mac = parse("m3-max-40c")[0].device
    assert [engine_of("gguf", d) for d in (cpu, mac)] == ["llama.cpp"] * 2
    assert engine_of("awq", card(8.0).device) == "vllm" and engine_of("bnb", card(8.0).device) == "transformers"
    assert engine_of("awq", cpu) == "qkit" and engine_of("awq", mac) == "transformers"
    assert small_cache("llama.cpp", mac) == "Q8_0" and small_cache("transformers", card(8.0).device) is None
    assert small_cache("vllm", card(8.0).device) == "F8_E4M3"
    assert small_cache("vllm", card(8.0, capability="7.0").device) is None
