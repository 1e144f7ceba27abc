"""Folders of models whose modules transformers renames as it loads: the real client, compressed-tensors, loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

import qkit
from qkit import formats
from qkit.kernels.codes import values_of
from qkit.models.client_names import client_names
from qkit.models.families import why_kept
from qkit.sources import open_source
from qkit.spec.dtypes import TensorMeta

pytest.importorskip("compressed_tensors")

TEXT = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 1}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip


def gemma3() -> Any:
    config = tf.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5)
    return tf.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=5
    )
    return tf.LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    config = tf.Mistral3Config(
        text_config=tf.MistralConfig(**TEXT), vision_config=tf.PixtralVisionConfig(**VISION), image_token_index=5
    )
    return tf.Mistral3ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
              "patch_size": 14}  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=5, video_token_id=6,
        vision_start_token_id=7,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def phimoe() -> Any:
    small = {k: v for k, v in TEXT.items() if k != "head_dim"}
    return tf.PhimoeForCausalLM(tf.PhimoeConfig(**small, num_local_experts=4, num_experts_per_tok=2))


def mixtral() -> Any:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def source(tmp_path: Path, build: Callable[[], Any]) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = build().bfloat16().eval()
    model.save_pretrained(tmp_path / "source")
    make_tokenizer(tmp_path / "source")
    return model, tmp_path / "source"


def dequantized(folder: Path, out: Path) -> Path:
    """The source with the values that the folder `out` holds, as qkit reads them."""
    converted = open_source(str(out))
    reader = formats.reader(converted.config)
    assert reader is not None
    tensors = load_file(folder / "model.safetensors")
    for module, scheme in formats.quantized_modules(reader, converted).items():
        values = values_of(formats.read_weight(reader, converted, module, scheme))
        tensors[f"{module}.weight"] = values.to(torch.bfloat16)
    copy = Path(shutil.copytree(folder, folder.parent / "dequantized"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("build", [gemma3, llava, mistral3, qwen2_5_vl, phimoe, mixtral], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_client_loads_it_and_computes_the_same(build, mixed, tmp_path):
    model, folder = source(tmp_path, build)
    more = {}
    if mixed:  # groups with targets by name, and a layer that is skipped
        (tmp_path / "r.yaml").write_text("- {modules: '*.up_proj', scheme: w4a16, group_size: 32}\n")
        more = {"recipe": str(tmp_path / "r.yaml"), "skip": ("*layers.0.self_attn.o_proj",)}
        if build in (phimoe, mixtral):
            (tmp_path / "r.yaml").write_text("- {modules: '*.experts.*', scheme: w4a16, group_size: 32}\n")
    result = qkit.convert(folder, tmp_path / "out", method="rtn", scheme="w8a16", group_size=32, **more)
    assert not any(note.startswith("WARNING") for note in result.plan.notes)
    out = result.out
    loaded = type(model).from_pretrained(out, dtype=torch.bfloat16)
    plain = type(model).from_pretrained(dequantized(folder, out), dtype=torch.bfloat16)
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits.float(), loaded(input_ids=ids).logits.float()
        original = model(input_ids=ids).logits.float()
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.02 < float((found - original).norm() / original.norm()) + 0.02
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored


def test_experts_of_more_than_one_scheme_are_refused(tmp_path):
    """transformers reads all experts with the first group's arguments, and says nothing."""
    source = make_model(tmp_path / "source", "mixtral")
    (tmp_path / "r.yaml").write_text("- {modules: '*.w2', scheme: w8a16}\n")
    with pytest.raises(qkit.QkitError, match="one scheme"):
        qkit.convert(source, tmp_path / "out", method="rtn", recipe=str(tmp_path / "r.yaml"), dry_run=True)


LINEARS = {
    f"model.layers.{i}.mlp.{name}.weight": torch.ones(64, 64, dtype=torch.bfloat16)
    for i in (0, 1)
    for name in ("up_proj", "down_proj")
}


def test_fused_experts_are_said_loudly(tmp_path):
    """Most of a model stays at 16 bits whose experts lie in a way that is not known."""
    torch.manual_seed(0)
    config = tf.GraniteMoeConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}, num_local_experts=4)
    tf.GraniteMoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    make_tokenizer(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({name.replace("put_linear", "put_matrices"): t for name, t in load_file(file).items()}, file)
    result = qkit.convert(tmp_path / "source", tmp_path / "out", method="rtn", scheme="w8a16")
    (warning,) = [note for note in result.plan.notes if note.startswith("WARNING")]
    assert "4 tensors hold all experts" in warning and "% of the model stays at 16 bits" in warning
    # DBRX has them in two dimensions, and without "weight".
    save_file({n.replace("mlp.down_proj.weight", "mlp.w2"): t for n, t in LINEARS.items()}, file)
    result = qkit.convert(tmp_path / "source", tmp_path / "dbrx", method="rtn", scheme="w8a16", dry_run=True)
    (warning,) = [note for note in result.plan.notes if note.startswith("WARNING")]
    assert "2 matrices are not known as linears" in warning and "mlp.w2: bias or norm" in warning


def test_names_of_both_sides(tmp_path):
    _, folder = source(tmp_path, phimoe)
    config = json.loads((folder / "config.json").read_text())
    found = client_names(config, ["model.layers.0.block_sparse_moe.gate", "model.layers.1.self_attn.q_proj"])
    assert found is not None
    assert found.all_of("model.layers.0.block_sparse_moe.gate") == (
        "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router",
    )  # fmt: skip
    assert found.all_of("model.layers.1.self_attn.q_proj") == ("model.layers.1.self_attn.q_proj",)
    assert client_names({"architectures": ["NoSuchModel"], "model_type": "llama"}, []) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "model.layers.0.feed_forward.router.weight",
        "transformer.blocks.1.ffn.router.layer.weight",
        "model.layers.3.mlp.router.proj.weight",
        "model.layers.3.mlp.gate.wg.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.3.mlp.moe_router.weight",
    ],
)
def test_routers_stay_wherever_their_name_says_so(name):
    assert why_kept(name, TensorMeta("BF16", (8, 128))) == "router"


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.gate_up_proj", "mlp.experts.3.gate_proj", "self_attn.g_proj"])
def test_what_is_no_router(name):
    assert why_kept(f"model.layers.0.{name}.weight", TensorMeta("BF16", (8, 128))) is None


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tied", tie_word_embeddings=True)


def changed(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def same_as_transformers(folder: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        found = qkit.load(folder, device="cpu", dtype="float32")(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_stored_head_that_differs_is_used(tied, tmp_path):
    """Whatever tie_word_embeddings says, before and after conversion; one that is the same is tied."""
    other = torch.randn(260, 128).bfloat16() * 0.06
    changed(tied, lambda t: {**t, "lm_head.weight": other})
    same_as_transformers(tied)
    out = qkit.convert(tied, tmp_path / "out", method="rtn", scheme="w8a16").out
    assert torch.equal(qkit.load(out, device="cpu").lm_head.weight, other)
    changed(tied, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    model = qkit.load(tied, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_names_of_the_same_tensors(tied, tmp_path):
    """Only the head of a tied pair; a decoder saved without "model.": what transformers loads, calibration runs too."""
    changed(tied, lambda t: {("lm_head.weight" if "embed" in k else k): v for k, v in t.items()})
    same_as_transformers(tied)
    changed(
        tied, lambda t: {("embed_tokens.weight" if "head" in k else k.removeprefix("model.")): v for k, v in t.items()}
    )
    same_as_transformers(tied)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    calibration = {"calib": str(tmp_path / "text.txt"), "calib_samples": 2, "calib_len": 64}
    out = qkit.convert(tied, tmp_path / "out", method="gptq", **calibration).out
    assert not any(name.startswith("layers.") for f in out.glob("*.safetensors") for name in load_file(f))


def test_zero_biases_of_other_writers(llama, tmp_path):
    out = qkit.convert(llama, tmp_path / "out", method="rtn", format="gptq").out
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    with torch.no_grad():
        ids = torch.arange(20)[None]
        expected = qkit.load(out, device="cpu")(ids).logits
        biases = {k.replace(".qweight", ".bias"): torch.zeros(v.shape[1], dtype=torch.float16)
                  for k, v in tensors.items() if k.endswith(".qweight")}  # fmt: skip
        save_file({**tensors, **biases}, file, {"format": "pt"})
        assert torch.equal(qkit.load(out, device="cpu")(ids).logits, expected)
    biases["model.layers.0.self_attn.q_proj.bias"][3] = 1
    save_file({**tensors, **biases}, file, {"format": "pt"})
    with pytest.raises(qkit.QkitError, match="the model has not"):
        qkit.load(out, device="cpu")
