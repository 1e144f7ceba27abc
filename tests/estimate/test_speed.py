"""The speed predictor: its roofline by hand, its fit against rates that are known, its intervals where nothing is."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qkit.estimate.engines import ENGINES, UNKNOWN, kernel_named, kernel_of, library, named
from qkit.estimate.parts import Part, Weights
from qkit.estimate.rates import Setting, as_dict, fitted, from_dict
from qkit.estimate.roofline import Ceilings, Manner, Rates, decode, micro_batch, prefill
from qkit.estimate.speed import Load, predict
from qkit.estimate.traffic import traffic
from qkit.hardware.catalogue import find
from qkit.models.architecture import architecture
from qkit.spec import preset

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.published import fitting, rows

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
FREE = Rates(0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)
CARD = Ceilings(1e12, 100e12, 100e12)


def work_of(config=LLAMA, bits=16.0, **options):
    arch = architecture(config)
    parts = [
        Part(
            m.role,
            round(m.numel * bits / 8),
            0,
            m.count,
            0 if m.role == "embedding" and not arch.tied else m.active or 1,
        )
        for m in arch.matrices
    ]
    return traffic(arch, Weights.of(parts), **options)


def test_bytes_and_values_of_a_known_model():
    work = work_of()
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert work.values == work.dense_values == linears
    assert work.weight_bytes(1) == 2 * linears and work.head_bytes == 2 * 128256 * 4096
    assert work.cache_bytes(1000) == 32 * 2 * 8 * 128 * 2 * 1000
    assert work.attention(1, 1) == 32 * 4 * 32 * 128 and work.groups == 4


def test_experts_that_are_met():
    mixtral = {
        **LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    work = work_of(mixtral)
    assert work.hit(1) == pytest.approx(0.25) and work.hit(1000) == pytest.approx(1)
    random.seed(0)
    met = [len({e for _ in range(5) for e in random.sample(range(8), 2)}) / 8 for _ in range(20000)]
    assert work.hit(5) == pytest.approx(sum(met) / len(met), rel=0.01)
    assert work.values < work.dense_values + work.expert_values


def test_windows_bound_what_is_read():
    gemma = {
        "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048, "vocab_size": 1000, "sliding_window": 512,
    }  # fmt: skip
    work = work_of(gemma)
    assert work.cache_bytes(4096) == 2 * 256 * 2 * (10 * 512 + 2 * 4096)


def test_decode_is_bytes_over_bandwidth():
    work = work_of()
    time = decode(work, CARD, Manner(), FREE, 1, 1000)
    expected = (work.weight_bytes(1) + work.head_bytes) / 1e12 + work.cache_bytes(1000) / 0.8e12
    assert time == pytest.approx(expected, rel=1e-3)  # what is multiplied meanwhile is not felt
    assert decode(work, replace(CARD, count=2), Manner(), FREE, 1, 1000) == pytest.approx(expected / 2, rel=1e-3)
    assert decode(work, replace(CARD, count=2), Manner(serial=True), FREE, 1, 1000) == pytest.approx(expected, rel=1e-3)
    launched = decode(work, CARD, Manner(), replace(FREE, launch=1e-3), 1, 1000)
    assert launched == pytest.approx(expected + 0.032, rel=1e-3)
    hidden = decode(work, CARD, Manner(overlaps=True), replace(FREE, launch=1e-2), 1, 1000)
    assert hidden == pytest.approx(0.32, rel=0.01)  # a host that is slower than the device


def test_prefill_is_operations_over_peak():
    work = work_of()
    between = 2048 * 32 * 4096 * 1000  # tokens x layers x width x operations between matrices
    expected = (2 * 2048 * work.values + work.attention(2048, 1024) + between) / 100e12
    assert prefill(work, CARD, Manner(), FREE, 1, 2048) == pytest.approx(expected, rel=0.01)
    pipelined = prefill(
        work, replace(CARD, count=4), Manner(chunked=True, serial=True), replace(FREE, pipeline=9), 1, 2048
    )
    assert pipelined == pytest.approx(expected * 7 / 16, rel=0.05)  # four passes through four stages


def test_expanded_weights_cost_their_16_bits():
    work = work_of(bits=4.5)
    one, two = (decode(work, CARD, Manner(expands=True), FREE, n, 1) for n in (1, 2))
    assert two - one == pytest.approx(4 * work.dense_values / 1e12, rel=0.01)


def test_a_micro_batch_reads_the_cache_once():
    work = work_of()
    a, b = (micro_batch(work, CARD, Manner(), FREE, 8, context) for context in (0.001, 10000))
    assert b - a == pytest.approx(work.cache_bytes(10000) / 0.8e12 + work.attention(8, 10000) / 100e12, rel=0.01)


def setting(engine="vllm", device="a100-80g-sxm", kernel="16", phase="decode", count=1):
    return Setting(ENGINES.get(engine, UNKNOWN), "", kernel, "", find(device), count, phase)


def test_more_is_slower_and_faster_where_it_must_be():
    work = work_of()
    at = [predict(work, setting(), Load("decode", 1, context, 1)).tokens_per_s for context in (64, 2048, 8192, 65536)]
    assert at == sorted(at, reverse=True)
    batches = [predict(work, setting(), Load("decode", n, 512, 1)).tokens_per_s for n in (1, 4, 16, 64)]
    assert batches == sorted(batches) and batches[1] < 4.001 * batches[0]
    assert predict(work_of(bits=4.2), setting(kernel="int4"), Load()).tokens_per_s > batches[0]
    two = predict(work, setting(count=2), Load()).tokens_per_s
    assert predict(work, setting(), Load()).tokens_per_s < two < 2 * predict(work, setting(), Load()).tokens_per_s


def test_bounds():
    work = work_of()
    assert predict(work, setting(), Load("decode", 1, 64, 1)).bound == "memory"
    assert predict(work, setting(phase="prefill"), Load("prefill", 1, 4096, 0)).bound == "compute"


def test_the_interval_widens_where_less_is_known():
    work, load = work_of(), Load("decode", 1, 512, 64)

    def width(engine, device):
        found = predict(work, setting(engine, device), load)
        assert found.low < found.tokens_per_s < found.high
        return math.log(found.high / found.low)

    seen = width("vllm", "a100-80g-sxm")
    assert seen < width("vllm", "a10") < width("lmdeploy", "a10") < width("unheard of", "mi300x")
    told = predict(work, setting("unheard of", "mi300x"), load).basis
    assert "no figure of unknown" in told
    assert "published figures of vllm on NVIDIA A100" in predict(work, setting(), load).basis


def test_unknown_where_nothing_supports_a_figure():
    card = replace(find("rtx-4090"), bandwidth_gbs=None)
    assert predict(work_of(), replace(setting(), device=card), Load()) is None
    card = replace(find("rtx-4090"), fp16_tflops=None, bf16_tflops=None, fp32_tflops=None)
    assert predict(work_of(), replace(setting(), device=card), Load()) is None


def test_the_fit_survives_json():
    fit = fitted()
    again = from_dict(as_dict(fit))
    assert set(again.terms) == set(fit.terms)
    assert all(again.terms[t] == pytest.approx(fit.terms[t], abs=1e-4) for t in fit.terms)


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("vLLM-0.6.3", "vllm"), ("llama.cpp(2024-05, layer split)", "llama.cpp"),
        ("ik_llama.cpp(-rtr)", "ik_llama.cpp"),
        ("HF-transformers-4.46", "transformers"), ("bitsandbytes+HF", "transformers"), ("TensorRT-LLM-1.0", "trt-llm"),
        ("TRT-LLM", "trt-llm"), ("torchao(eager)", "transformers"), ("torchao tinygemm", "compile"),
        ("ExLlamaV2", "exllama"),
        ("mlx-lm 0.20", "mlx"), ("Ollama 0.5", "llama.cpp"), ("SGLang-0.4.6", "sglang"), ("AutoAWQ-0.1.6", "autoawq"),
        ("LMDeploy", "lmdeploy"), ("something else", "unknown"),
    ],
)  # fmt: skip
def test_engines_by_their_published_names(text, engine):
    assert named(text).name == engine


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("GGUF Q4_K_M", "ggufk"), ("GGUF F16", "gguf16"), ("GGUF BF16", "gguf16"), ("GGUF Q8_0", "gguf0"),
        ("Q4_0_8_8", "gguf0"), ("GGUF IQ4_XS", "ggufk"), ("AWQ int4 g128 (GEMM)", "int4"), ("GPTQ-Int8", "int8"),
        ("BF16", "16"), ("fp16", "16"), ("FP8 (fp8 KV)", "fp8"), ("bf16 (int8 KV)", "16"), ("W8A8", "w8a8"),
        ("W4A8KV4", "w4a8"), ("NVFP4", "nvfp4"), ("NF4", "nf4"), ("LLM.int8(no decomp)", "llm.int8"),
        ("int8 sym per-channel A16W8", "int8"), ("int4 asym g64 A16W4", "int4"), ("HQQ int4 asym g64 (Marlin)", "int4"),
        ("EXL2", "int4"), ("fp6 (fp16 act)", "fp6"), ("MXFP4", "mxfp4"),
    ],
)  # fmt: skip
def test_kernels_by_their_published_names(text, kind):
    assert kernel_named(text, 4.5) == kind


def test_kernels_of_schemes():
    kinds = {name: kernel_of(preset(name)) for name in ("w4a16", "w8a16", "w8a8", "fp8", "nf4", "nvfp4a16", "mxfp4a16")}
    assert kinds == {
        "w4a16": "int4", "w8a16": "int8", "w8a8": "w8a8", "fp8": "fp8", "nf4": "nf4", "nvfp4a16": "nvfp4",
        "mxfp4a16": "mxfp4",
    }  # fmt: skip
    assert kernel_of(None) == "16"


def test_libraries():
    assert library(ENGINES["compile"], "int4", "torchao tinygemm", "int4") == "tinygemm"
    assert library(ENGINES["vllm"], "int4") == "marlin" and library(ENGINES["vllm"], "16") == ""
    assert library(ENGINES["vllm"], "int4", "vLLM-Machete") == "machete"


HEADER = (
    "model,params_b,format,bits,engine,gpu,n_gpus,batch,prompt_len,gen_len_or_ctx,phase,tokens_per_s,vram_gib,source\n"
)


def _made_up(tmp_path: Path, seed: int, offsets) -> list[rows.Row]:
    """Figures that a known set of terms gives, with 3 % of noise."""
    random.seed(seed)
    lines = [HEADER]
    for model, size in (("Llama-2-7B", 6.74), ("Llama-2-13B", 13.0), ("Qwen2.5-32B", 32.8)):
        for gpu in ("A100-80GB-SXM", "RTX 4090", "H100-80GB-SXM", "L40S", "RTX 3090"):
            for engine in ("vLLM-1", "HF-transformers-1", "llama.cpp(1)"):
                for batch in (1, 16):
                    lines.append(f"{model},{size},fp16,16,{engine},{gpu},1,{batch},128,128,decode,1,,made up\n")
    path = tmp_path / "made-up.csv"
    path.write_text("".join(lines))
    found, skipped = rows.read(path)
    assert not skipped and len(found) == 90
    truth = replace(fitted(), terms=offsets)
    made = []
    for row in found:
        answer = predict(row.work, row.setting, row.load, room=row.room, fit=truth)
        made.append(replace(row, tokens_per_s=answer.tokens_per_s * math.exp(random.gauss(0, 0.03))))
    return made


def test_the_fit_finds_rates_that_it_is_shown(tmp_path: Path):
    offsets = {
        ("launch", "engine", "transformers"): (0.4, 0.0),
        ("bandwidth", "device", "rtx-4090"): (-0.15, 0.0),
        ("bandwidth", "engine", "vllm"): (0.1, 0.0),
        ("compute", "engine", "llama.cpp"): (-0.5, 0.0),
    }
    prior = replace(fitted(), terms={})
    figures = _made_up(tmp_path, 1, offsets)
    answers = [a for part in fitting.held_out(figures, prior, "model, engine and device") for a in part]
    errors = sorted(abs(a.error) for a in answers)
    assert errors[len(errors) // 2] < 0.04 and sum(a.covered for a in answers) > 0.9 * len(answers)
    blind = fitting.check(figures, prior)
    assert sorted(abs(a.error) for a in blind)[len(blind) // 2] > 2 * errors[len(errors) // 2]


def test_one_wild_figure_spoils_nothing(tmp_path: Path):
    figures = _made_up(tmp_path, 2, {})
    figures[0] = replace(figures[0], tokens_per_s=figures[0].tokens_per_s * 40)
    found = fitting.fit(figures, replace(fitted(), terms={}))
    errors = [abs(a.error) for a in fitting.check(figures[1:], found)]
    assert max(errors) < 0.2


def test_what_is_no_figure(tmp_path: Path):
    path = tmp_path / "odd.csv"
    path.write_text(
        HEADER + "Llama-2-7B,6.74,fp16,16,vLLM,Voodoo 2,1,1,1,1,decode,10,,x\n"
        "Nobody-1B,,fp16,16,vLLM,A100-80GB-SXM,1,1,1,1,decode,10,,x\n"
        "Llama-2-7B,6.74,fp16,16,vLLM,A100-80GB-SXM,1,1,1,1,decode,,,memory only\n"
        "Nobody-9B,9,fp16,16,vLLM,A100-80GB-SXM,1,1,1,1,decode,10,,x\n"
    )
    found, skipped = rows.read(path)
    assert len(found) == 1 and len(skipped) == 2
    assert 8.5e9 < found[0].work.values + found[0].work.head_values < 9.5e9  # like the nearest that is known


def test_figures_of_engines_and_devices_that_were_never_fitted():
    """The shipped fit against the table that it never sees: benchmarks/speed_fit.py --score prints the same."""
    found, skipped = rows.read(Path(rows.__file__).with_name("figures.csv"))
    answers = fitting.check(found, fitted())
    assert len(answers) > 500 and len(skipped) < 0.15 * len(found)
    errors = sorted(abs(a.error) for a in answers)
    assert sum(a.covered for a in answers) >= 0.8 * len(answers)
    assert errors[len(errors) // 2] <= 0.3
    unseen = [a for a in answers if ("bandwidth", "engine", a.row.setting.engine.name) not in fitted().terms]
    assert len(unseen) > 100 and sum(a.covered for a in unseen) >= 0.8 * len(unseen)
    known = [a for a in answers if a.row.setting.engine.name in ("vllm", "llama.cpp")]

    def width(some: list[fitting.Checked]) -> float:
        return sorted(a.predicted.high / a.predicted.low for a in some)[len(some) // 2]

    assert width(unseen) > width(known)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[rows.Row]:
    path = request.config.getoption("--speed-figures")
    if not path:
        pytest.skip("no table of published speeds: name one with --speed-figures FILE")
    found, skipped = rows.read(Path(path))
    assert not skipped
    return found


@pytest.mark.parametrize("split", fitting.SPLITS)
def test_figures_that_the_fit_did_not_see(figures: list[rows.Row], split: str):
    """A third left out, three times: benchmarks/speed_fit.py prints the same as tables."""
    answers = [a for part in fitting.held_out(figures, replace(fitted(), terms={}), split) for a in part]
    errors = sorted(abs(a.error) for a in answers)
    assert sum(a.covered for a in answers) >= 0.8 * len(answers)
    if split == "model, engine and device":
        assert errors[len(errors) // 2] <= 0.12
