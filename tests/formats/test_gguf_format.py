"""GGUF files that qkit writes, read back by qkit and by the `gguf` package; llama.cpp itself is in tests/interop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import FAMILIES, make_model

import qkit
from qkit.errors import QkitError
from qkit.formats.gguf import mixes
from qkit.formats.gguf.mixes import Facts, wanted
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.spec.ggml import GGML
from qkit.storage.gguf import MAX_NAME_BYTES, Entry, Typed, gguf_header
from qkit.text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256, "rope_theta": 500000.0,
}  # fmt: skip
MODELS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
}  # fmt: skip


def converted(tmp_path: Path, name: str, **options) -> tuple[Path, Path]:
    family, changes = MODELS[name]
    source = make_model(tmp_path / "source", family, **changes)
    qkit.convert(source, tmp_path / "out", format="gguf", **options)
    return source, tmp_path / "out"


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back(name, tmp_path):
    """Exported and read again: the same tensors, bit for bit, and the same logits."""
    source, out = converted(tmp_path, name, scheme="none")
    before, after = open_source(str(source)), open_source(str(out))
    assert set(after.names()) == set(before.names())
    for tensor in before.names():
        rows = 259 if name == "gemma3_text" and "embed" in tensor else None  # of its 260 the vocabulary has 259
        assert torch.equal(after.read(tensor).float(), before.read(tensor).float()[:rows]), tensor
    tokens = torch.arange(0, 240).view(2, 120) % 256
    with torch.inference_mode():
        expected, found = (qkit.load(m, device="cpu", dtype="float32")(tokens).logits for m in (source, out))
    assert torch.allclose(found, expected[..., : found.shape[-1]], atol=2e-5)
    assert load_tokenizer(after)("Größe 日本 \n x").input_ids == load_tokenizer(before)("Größe 日本 \n x").input_ids


def test_the_oracle_reads_it(tmp_path):
    """The `gguf` package finds the same values, dequantized, and the metadata that llama.cpp asks for."""
    _, out = converted(tmp_path, "llama", scheme="q4_k_m", method="rtn")
    reader = gguf.GGUFReader(the_file(out))
    opened = open_source(str(out))
    for tensor in reader.tensors:
        oracle = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "blk.1.ffn_down.weight":
            found = opened.read("model.layers.1.mlp.down_proj.weight").float()
            assert torch.equal(torch.from_numpy(oracle.copy()).bfloat16().float(), found)
            assert tensor.tensor_type.name == "Q6_K"
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 15
    assert fields["llama.rope.freq_base"] == 10000.0 and fields["llama.vocab_size"] == 260
    assert fields["tokenizer.ggml.model"] == "gpt2" and len(fields["tokenizer.ggml.tokens"]) == 260
    assert fields["tokenizer.ggml.tokens"][259] == "[PAD259]"  # rows of the embedding that no token has
    assert fields["tokenizer.ggml.token_type"][256:] == [3, 3, 3, 5]


def test_the_demo_tokenizer_comes_back(tmp_path):
    qkit.convert("demo", tmp_path / "out", format="gguf", scheme="q8_0")
    before, after = (load_tokenizer(m) for m in ("demo", tmp_path / "out"))
    for text in (
        "It's 12345\n\n\tTabs",
        "Größe – naïve",
        "日本語 한국어 हिन्दी",
        "🙂👍🏽",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    inspected = inspect(str(tmp_path / "out"), verify=True)
    assert inspected.problems == [] and inspected.parameters == 134_515_008
    assert inspected.base_model == inspect("demo").base_model


@pytest.mark.parametrize("method", ["rtn", "imatrix"])
def test_the_same_bytes_whoever_runs_it_and_however_often_it_is_stopped(method, tmp_path, monkeypatch):
    source = make_model(tmp_path / "source", num_hidden_layers=3)
    options = {"format": "gguf", "scheme": "q4_k_m", "method": method}
    if method == "imatrix":
        (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
        options |= {"calib": str(tmp_path / "text.txt"), "calib_samples": 4, "calib_len": 64}
    qkit.convert(source, tmp_path / "one", **options)
    from qkit.conversion import execute

    quantized, stopped = execute.Produce.__call__, []

    def stop(self, job):
        if len(stopped) < 3 and job.source.endswith(f"layers.{len(stopped)}.mlp.up_proj.weight"):
            stopped.append(job.source)
            raise KeyboardInterrupt
        return quantized(self, job)

    monkeypatch.setattr(execute.Produce, "__call__", stop)
    if method == "imatrix":  # what was observed is observed once
        from qkit.calibrate import observe

        seen, observed = [], observe.observe
        monkeypatch.setattr(observe, "observe", lambda *a, **k: (seen.append(1), observed(*a, **k))[1])
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            qkit.convert(source, tmp_path / "two", **options)
    assert qkit.convert(source, tmp_path / "two", **options).resumed is (method == "imatrix")
    if method == "imatrix":
        assert seen == [1]
    assert the_file(tmp_path / "one").read_bytes() == the_file(tmp_path / "two").read_bytes()


def test_importance_lowers_the_error_on_the_calibration_text(tmp_path):
    source = make_model(tmp_path / "source", hidden_size=256, head_dim=64)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    from qkit.calibrate.observe import read_moments
    from qkit.storage.local import LocalStore

    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 4, "calib_len": 64}
    for method, own in (("rtn", {}), ("imatrix", calibration)):
        qkit.convert(source, tmp_path / method, format="gguf", scheme="q4_0", method=method, **own)
    moments = read_moments(LocalStore(tmp_path / "imatrix"), "imatrix.safetensors")
    original = open_source(str(source))
    total = {}
    for method in ("rtn", "imatrix"):
        made = open_source(str(tmp_path / method))
        total[method] = sum(
            float(((made.read(n).float() - original.read(n).float()).square() * moments[n].square).sum())
            for n in moments
            if "down_proj" not in n  # of which the first get another type with an importance matrix
        )
    assert len(moments) == 14 and total["imatrix"] < total["rtn"]
    entry = json.loads((tmp_path / "imatrix" / "qkit_manifest.json").read_text())["tensors"]
    assert entry["model.layers.0.mlp.up_proj.weight"]["method"] == "imatrix"
    assert entry["model.layers.0.mlp.up_proj.weight"]["calibration_tokens"] == 256
    assert entry["lm_head.weight"]["method"] == "rtn"


def test_a_file_is_a_source_again_and_its_calibration_is_known(tmp_path):
    source = make_model(tmp_path / "source")
    text = "The quick brown fox jumps over the lazy dog. " * 400
    (tmp_path / "text.txt").write_text(text)
    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 4, "calib_len": 64}
    qkit.convert(source, tmp_path / "a", format="gguf", scheme="q8_0", method="imatrix", **calibration)
    again = qkit.convert(the_file(tmp_path / "a"), tmp_path / "b", format="gguf", scheme="q4_0", method="rtn")
    assert "itself quantized" in " ".join(again.plan.notes)
    for place in (tmp_path / "a", the_file(tmp_path / "a")):
        assert open_source(str(place)).folder == tmp_path / "a"


def test_mixtures_of_experts_are_stacked(tmp_path):
    _, out = converted(tmp_path, "mixtral", scheme="q4_0", method="rtn")
    tensors = {t.name: t for t in gguf.GGUFReader(the_file(out)).tensors}
    stacked = tensors["blk.0.ffn_down_exps.weight"]
    assert list(stacked.shape) == [256, 128, 4] and tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    found = torch.from_numpy(gguf.quants.dequantize(stacked.data, stacked.tensor_type).copy()).view(4, 128, 256)
    for e in range(4):
        mine = open_source(str(out)).read(f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight")
        assert torch.equal(found[e].bfloat16(), mine)


# Seen in files that llama.cpp's own quantizer wrote (tests/interop/test_gguf.py asks it again).
@pytest.mark.parametrize(
    ("mix", "name", "layers", "expected"),
    [
        ("q4_k_m", "blk.0.attn_v.weight", 32, "Q6_K"),
        ("q4_k_m", "blk.5.attn_v.weight", 32, "Q4_K"),
        ("q4_k_m", "blk.6.ffn_down.weight", 32, "Q6_K"),
        ("q4_k_m", "blk.31.ffn_down.weight", 32, "Q6_K"),
        ("q4_k_m", "output.weight", 32, "Q6_K"),
        ("q4_k_m", "token_embd.weight", 32, "Q4_K"),
        ("q4_0", "output.weight", 32, "Q6_K"),
        ("q8_0", "output.weight", 32, "Q8_0"),
        ("q4_k_s", "blk.3.attn_v.weight", 32, "Q5_K"),
        ("q3_k_m", "blk.7.attn_output.weight", 32, "Q4_K"),
    ],
)
def test_mixes(mix, name, layers, expected):
    assert wanted(mix, name, 4096, Facts(layers), tied=False) == expected


def test_rows_that_super_blocks_do_not_divide():
    assert mixes.fallback("Q4_K", 576) == "Q5_0" and mixes.fallback("Q6_K", 576) == "Q8_0"
    assert mixes.fallback("Q4_K", 100) == "F16" and mixes.fallback("Q4_K", 512) == "Q4_K"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf", "scheme": "w4a16"}, "gguf does not hold int4"),
        ({"format": "compressed-tensors", "scheme": "q4_k_m"}, "does not hold q4_k_m"),
        ({"format": "gptq", "scheme": "q4_0"}, "does not hold q4_0"),
        ({"format": "gguf", "group_size": 64}, "blocks of its own size"),
        ({"format": "gguf", "method": "gptq"}, "gptq makes integer weights"),
        ({"format": "compressed-tensors", "method": "imatrix"}, "imatrix makes GGUF's block types"),
        ({"format": "gguf", "method": "rtn", "clip_search": True}, "--clip-search"),
        ({"format": "gguf", "scheme": "q9_k"}, "unknown scheme"),
    ],
)
def test_what_does_not_go_together_is_refused_in_the_plan(options, message, llama, tmp_path):
    with pytest.raises(QkitError, match=message) as caught:
        qkit.convert(llama, tmp_path / "out", dry_run=True, **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "sliding-window layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, message, tmp_path):
    source = make_model(tmp_path / "source", family, **changes)
    with pytest.raises(QkitError, match=message):
        qkit.convert(source, tmp_path / "out", format="gguf", dry_run=True)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_count_is_held_against_the_tensors(key, tmp_path):
    source = make_model(tmp_path / "source", "mixtral")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: 10**9}))
    with pytest.raises(QkitError, match=r"experts is 1000000000|1000000000 decoder blocks"):
        qkit.convert(source, tmp_path / "out", format="gguf", dry_run=True)


@pytest.mark.parametrize("shape", [(), (260,), (260, 64), (260, 128, 1)])
def test_an_embedding_of_another_shape_is_refused(llama, tmp_path, shape):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    found = load_file(folder / "model.safetensors")
    found["model.embed_tokens.weight"] = torch.ones(shape)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QkitError, match="shape"):
        qkit.convert(folder, tmp_path / "out", format="gguf", dry_run=True)


def test_unknown_tokenizers_and_tensors_are_refused(llama, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def changed(name, edit):
        folder = Path(shutil.copytree(llama, tmp_path / name))
        edit(folder)
        with pytest.raises(QkitError) as caught:
            qkit.convert(folder, tmp_path / "out", format="gguf", dry_run=True)
        return caught.value.message

    def tokenizer(change):
        def edit(folder):
            given = json.loads((folder / "tokenizer.json").read_text())
            change(given)
            (folder / "tokenizer.json").write_text(json.dumps(given))

        return edit

    def tensors(change):
        def edit(folder):
            found = load_file(folder / "model.safetensors")
            change(found)
            save_file(found, folder / "model.safetensors", {"format": "pt"})

        return edit

    assert "type 'Unigram'" in changed("a", tokenizer(lambda t: t["model"].update(type="Unigram")))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    unknown = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, level]}
    assert "pre-tokenizer" in changed("b", tokenizer(lambda t: t.update(pre_tokenizer=unknown)))
    extra = {"model.layers.0.self_attn.sinks": torch.ones(4)}
    assert "no place in a GGUF file" in changed("c", tensors(lambda t: t.update(extra)))
    assert "are missing" in changed("d", tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))


def test_headers_are_checked():
    entry = Entry("x" * (MAX_NAME_BYTES + 1), GGML["F32"], (4,))
    with pytest.raises(ValueError, match="longer than"):
        gguf_header({}, [entry])
    with pytest.raises(ValueError, match="twice"):
        gguf_header({}, [Entry("a", GGML["F32"], (4,))] * 2)
    assert gguf_header({"a": Typed("u32", 1)}, [])[:4] == b"GGUF"
