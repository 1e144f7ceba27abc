"""`profile` end to end on tiny models, and the memory formulas against real caches and tensors."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from models import make_model

import qkit
from qkit.errors import QkitError
from qkit.measure import fit, footprint, memory, profile, speed, summary
from qkit.models.architecture import architecture
from qkit.report import write as report
from qkit.runtime import load
from qkit.text import defaults as text
from qkit.text.sketch import sketch

VOCAB = 500
ROTARY = 2 * 8 * 4  # bytes of the frequencies, which a model computes and no checkpoint holds
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few steps, one thread, no process for memory (test_footprint.py has those): the figures are not looked at."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "GENERATED", 6)
        patch.setattr(speed, "REPEATS", 2)
        patch.setattr(speed, "_CEILING_BYTES", 1 << 20)
        patch.setattr(footprint, "apart", lambda *given: footprint.measure(*given, threads=1))
        yield
    torch.set_num_threads(threads)


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([text.evaluation_text().content[:20_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base, its W4 conversion) of a tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qkit.conversion.run import convert

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    base, quantized = root / "tiny", root / "tiny-w4"
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(base)
    save_tokenizer(base)
    convert(str(base), str(quantized), method="rtn", group_size=32)
    return str(base), str(quantized)


def run(model, tmp_path, **options):
    return profile(model, device="cpu", out=str(tmp_path / "report"), chunks=2, **options)


def test_a_converted_model_against_its_source(folders, tmp_path):
    base, quantized = folders
    result = run(quantized, tmp_path, baseline=base, batch=[1, 3], context=40, max_kld=10.0, min_tps=0.0)
    assert result.passed and result.failures == ()
    (row,), other = result.models, result.baseline
    assert row.stored_bytes < other.stored_bytes and row.bits_per_weight < 16 == other.bits_per_weight
    assert row.parameters == other.parameters
    assert sum(row.kernels.values()) == sum(row.schemes.values()) == 3 * 7 and other.kernels == {}
    assert other.stored_types == {"BF16": 30} and not other.stored_quantized and row.stored_quantized
    m, formula = row.memory, row.formula
    assert m.weights == m.packed + m.embeddings + m.unquantized and m.packed > 0 and other.memory.packed == 0
    assert (m.tokens, m.batch) == (40, 3)
    assert m.kv_cache == formula.kv_cache == 2 * 3 * 2 * 16 * 2 * 3 * 40
    assert formula.max_tokens == 256 and formula.kv_cache_max == 2 * 3 * 2 * 16 * 2 * 3 * 256
    assert formula.weights == row.stored_bytes
    assert other.formula.weights == other.memory.weights - ROTARY
    assert m.total == m.weights + m.kv_cache + m.activations + m.process and m.fits and m.problem is None
    assert m.process > 50 << 20 and m.free_bytes <= m.device_bytes
    assert [s.batch for s in row.speed] == [1, 3]
    for s in row.speed:
        assert len(s.ttft) == speed.REPEATS and len(s.tpot) == speed.REPEATS * (speed.GENERATED - 1)
        assert s.prompt == 40 and s.tpot_p50 <= s.tpot_p99 and min(s.ttft) <= s.ttft_median <= max(s.ttft)
        assert s.prefill_tps == pytest.approx(s.batch * 40 / s.ttft_median)
        assert s.decode_tps == pytest.approx(s.batch * len(s.tpot) / sum(s.tpot))
        assert len(s.generate) == speed.REPEATS and all(a > b for a, b in zip(s.generate, s.generate_tail, strict=True))
        calls = s.batch * speed.REPEATS
        assert s.generate_tps == pytest.approx(calls * (speed.GENERATED - 1) / sum(s.generate_tail))
        assert s.generate_call_tps == pytest.approx(calls * speed.GENERATED / sum(s.generate))
    against = row.quality["full"].against
    assert row.quality.how == "both loaded" and row.speed_how == "in turns with the baseline" and row.loaded
    assert row.on_frontier is True and other.on_frontier is None and other.quality is None
    assert 0 < against.kld.value < 1 and 0 < against.same_top.value <= 1
    assert row.overlap.startswith("nothing to check")
    assert row.conversion["method"] == "rtn" and len(row.manifest_sha256) == 64
    assert result.provenance["command"].startswith("qkit profile ")
    parsed = json.loads((tmp_path / "report" / "profile.json").read_text())
    assert parsed["schema_version"] == 3 and parsed["models"][0]["memory"]["weights"] == m.weights
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(report.NAMES)
    assert "profile.html" in summary(result)


def test_a_model_alone(folders, tmp_path):
    result = run(folders[0], tmp_path, context=16)
    assert result.baseline is None and result.models[0].quality["full"].against is None
    assert result.models[0].quality["full"].perplexity.value == pytest.approx(
        VOCAB, rel=0.5
    )  # random weights know nothing
    assert result.models[0].overlap.startswith("not checked: the model has no qkit manifest")
    assert result.models[0].speed[0].read_gbs > 0


def test_missed_thresholds(folders, tmp_path):
    result = run(folders[1], tmp_path, baseline=folders[0], context=16, max_kld=0.0, min_tps=1e9)
    assert not result.passed and len(result.failures) == 2
    assert result.failures[1].startswith("generate at batch 1 gives ")


def test_a_failure_of_the_memory_s_process_loses_nothing_else(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(footprint, "apart", lambda *given: "its process was ended by SIGKILL")
    result = run(folders[0], tmp_path, context=16)
    m = result.models[0].memory
    assert (m.total, m.kv_cache, m.activations, m.process, m.fits) == (None,) * 5 and m.weights > 0
    assert m.problem == "its process was ended by SIGKILL" and result.models[0].speed[0].generate_tps > 0
    for body in [summary(result), *((tmp_path / "report" / n).read_text() for n in report.NAMES)]:
        assert "ended by SIGKILL" in body
    assert "memory of" in capsys.readouterr().err


def test_a_quantized_baseline_is_named_where_a_threshold_is_missed(folders, tmp_path):
    result = run(folders[0], tmp_path, baseline=folders[1], context=16, max_kld=0.0)
    assert result.failures[0].startswith("mean KL divergence ")
    assert "against a baseline that is itself quantized (int4" in result.failures[0]


@pytest.mark.parametrize("overlapping", [True, False])
def test_overlap_with_the_calibration_text_is_checked(folders, tmp_path, overlapping):
    import shutil

    folder = tmp_path / "calibrated"
    shutil.copytree(folders[1], folder)
    manifest = json.loads((folder / "qkit_manifest.json").read_text())
    source = text.evaluation_text().content[200:3000] if overlapping else text.calibration_text().content
    manifest["identity"]["calibration"] = {"name": "their text", "sketch": sketch(source)}
    (folder / "qkit_manifest.json").write_text(json.dumps(manifest))
    if overlapping:
        with pytest.raises(
            QkitError, match=r"shares .* of its words with the text that .*calibrated was calibrated on"
        ):
            run(str(folder), tmp_path)
        assert run(str(folder), tmp_path, context=16, allow_overlap=True).models[0].overlap.startswith("OVERLAPS: ")
        assert "OVERLAPS: " in (tmp_path / "report" / "profile.md").read_text()
        return
    result = run(str(folder), tmp_path, context=16)
    assert result.models[0].overlap.startswith("checked: no passage") and "their text" in result.models[0].overlap
    assert "sketch" not in result.models[0].conversion["calibration"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kld": 0.1}, "needs a model to compare with"),
        ({"max_kld": math.nan, "baseline": "x"}, "--max-kld must be a number"),
        ({"min_tps": -1.0}, "--min-tps must be a number"),
        ({"batch": []}, "--batch takes 1 or more"),
        ({"batch": [0]}, "--batch must be at least 1"),
        ({"context": 4}, "--context must be at least 8"),
        ({"context": 257}, "at most 256 tokens, not 257"),
        ({"text": "missing.txt"}, "no such text file"),
    ],
)
def test_bad_options_are_refused_before_work(folders, tmp_path, options, message):
    with pytest.raises(QkitError, match=message):
        run(folders[0], tmp_path, **options)
    assert not list((tmp_path / "report").glob("*"))


def test_devices_that_are_not_here(folders, tmp_path):
    with pytest.raises(QkitError, match="no device"):
        profile(folders[0], device="cuda:99", out=str(tmp_path / "r"))
    with pytest.raises(QkitError, match="one at a time"):
        profile(folders[0], device=("cpu", "rtx-4090"), out=str(tmp_path / "r"))
    with pytest.raises(QkitError, match="unknown device") as caught:
        profile(folders[0], device="rtx-4009", out=str(tmp_path / "r"))
    assert "rtx-4090" in caught.value.hint
    with pytest.raises(QkitError, match="--baseline is for what is measured"):
        profile(folders[0], device="mi300x", baseline=folders[0], out=str(tmp_path / "r"))
    found = profile(folders[0], device="mi300x", out=str(tmp_path / "r"))
    assert found.estimates[0].answers[0].fit.fits and found.as_dict()["kind"] == "predicted"


def test_an_unusable_output_folder(folders, tmp_path):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(QkitError, match="cannot be made"):
        run(folders[0], tmp_path)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(folders, tmp_path, monkeypatch):
    from dataclasses import replace

    from qkit.hardware import detect

    here = replace(detect.cpu(), available_bytes=1000)
    monkeypatch.setattr("qkit.measure.run.resolve", lambda name: here)
    with pytest.raises(QkitError, match=r"for weights and, even block by block, .*; cpu has 1\.0 kB for it"):
        run(folders[0], tmp_path)


def test_a_batch_too_large_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    for step in ("load", "load_tokenizer"):
        monkeypatch.setattr(f"qkit.runtime.{step}", lambda *given, **named: pytest.fail("loaded"))
    with pytest.raises(QkitError, match=r"at --batch 100000000 and --context 16 needs .* for the KV cache") as caught:
        run(folders[0], tmp_path, context=16, batch=[1, 100_000_000])
    assert caught.value.hint.startswith("the largest --batch that fits at --context 16 is ")


def test_what_fits_is_the_most_that_fits(folders):
    from dataclasses import replace

    from qkit.hardware import detect
    from qkit.sources import open_source

    sizes = [fit.sizes(open_source(folder)) for folder in folders]
    loaded = memory.weights(load(folders[0])).total
    assert sizes[0].weights == loaded - ROTARY and sizes[1].weights == open_source(folders[1]).stored.nbytes
    here = detect.cpu()

    def need(tokens, batch):
        cache = 2 * 3 * 2 * 16 * 2 * (tokens + speed.GENERATED)
        head = VOCAB * (2 + 8)
        layer = tokens * 2 * (2 * 64 + 3 * 96)
        return sum(s.weights for s in sizes) + batch * (cache + max(head, layer))

    for device in ("cpu", "cuda:0"):
        exactly = replace(here, id=device, available_bytes=need(100, 7))
        assert fit.check(fit.Load(sizes, exactly, 100, 7, 128))
        with pytest.raises(QkitError, match=r"at --batch 9 and --context 100 ") as caught:
            fit.check(fit.Load(sizes, exactly, 100, 9, 128))
        most = max(tokens for tokens in range(8, 100) if need(tokens, 9) <= exactly.available_bytes)
        assert caught.value.hint == (
            "the largest --batch that fits at --context 100 is 7; "
            f"the largest --context that fits at --batch 9 is {most}"
        )
        with pytest.raises(QkitError, match="for it") as caught:
            fit.check(fit.Load(sizes, replace(exactly, available_bytes=exactly.available_bytes - 1), 100, 7, 128))
        assert "--batch that fits at --context 100 is 6" in caught.value.hint
        assert not fit.check(fit.Load(sizes, replace(exactly, available_bytes=sizes[0].weights), 100, 7, 128))


def test_the_head_takes_what_the_check_counts_for_it(tmp_path):
    """The logits of a large vocabulary outweigh the rest here, and no copy of the head's weight is made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qkit.sources import open_source

    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 100_000})).bfloat16()
    model.save_pretrained(tmp_path)
    counted = fit.sizes(open_source(str(tmp_path))).head(4)
    found = footprint.measure(str(tmp_path), "cpu", list(range(64)), 4, 0, threads=1)
    assert found.activations <= 1.3 * counted


def models():
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "mistral sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=16, layer_types=kinds)
        ),
    }


@pytest.mark.parametrize("kind", list(models()))
@pytest.mark.parametrize(("tokens", "batch"), [(5, 1), (40, 2)])
def test_the_kv_formula_is_what_the_cache_holds(kind, tokens, batch):
    model = models()[kind]().eval()
    with torch.inference_mode():
        ids = torch.randint(0, VOCAB, (batch, tokens - 1))
        out = model(input_ids=ids, use_cache=True)
        out = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values.get_seq_length() == tokens
    sizes = fit.Sizes(kind, architecture(model.config.to_dict()), "F32", 0)
    formula, words = sizes.kv(tokens, batch)
    assert formula == memory.cache_bytes(out.past_key_values)
    assert f"batch {batch}" in words


@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_weights_are_counted_once(kind):
    model = models()[kind]()
    tied = kind == "llama tied"
    parts = memory.weights(model)
    embedding = VOCAB * 64 * 4
    assert parts.embeddings == embedding and parts.packed == 0
    state = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert parts.total == state
    assert memory.read_per_token(model) == (state if tied else state - embedding)


@pytest.mark.parametrize("scheme", [None, "w4a16"])
def test_of_experts_those_are_read_that_a_token_is_given_to(scheme, tmp_path):
    folder = make_model(tmp_path / "source", "mixtral", intermediate_size=128)
    if scheme:
        folder = qkit.convert(folder, tmp_path / "out", scheme=scheme, method="rtn", group_size=32).out
    model = load(folder)
    matrices = 2 * 4 * 3 * 128 * 128  # layers, experts, matrices
    each = 2 if scheme is None else 0.5 + 2 / 32
    whole = memory.weights(model).total - 260 * 128 * 2
    assert memory.read_per_token(model) == whole - matrices * each // 2


@pytest.mark.parametrize("reset", [True, False])
def test_peak_memory_sees_an_allocation(monkeypatch, reset):
    if not reset:
        monkeypatch.setattr("qkit.hardware.memory.reset_peak", lambda: False)
    with memory.peak(torch.device("cpu")) as seen:
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])
        for _ in range(0 if reset else 400):  # a thread looks now and then: give it the time a busy machine needs
            time.sleep(0.05)
            if seen()[0] > 48 << 20:
                break
        del block
        found, how = seen()
    assert found > 48 << 20 and how
