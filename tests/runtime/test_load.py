"""load(): the logits of the dequantized model, every tensor accounted for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file

from qkit import formats
from qkit.errors import QkitError
from qkit.methods import rtn
from qkit.runtime import QuantLinear, load, load_tokenizer
from qkit.sources import open_source
from qkit.spec import CHANNEL, LayerSpec, integer

BLOCK = ".layers."


def quantize_folder(source: Path, out: Path, fmt_name: str, scheme: LayerSpec) -> Path:
    """`source` rounded and packed, file by file as the format says: independent of `qkit.convert`."""
    fmt = formats.get(fmt_name)
    scheme = fmt.scheme_for(scheme, "BF16")
    tensors, schemes = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if BLOCK in name and weight.dim() == 2 and not module.endswith("gate"):
            schemes[module] = scheme
            tensors |= {f"{module}.{k}": v for k, v in fmt.pack(rtn.quantize(weight, scheme)).items()}
        else:
            tensors[name] = weight
    shutil.copytree(source, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = fmt.config(schemes, ["lm_head"], {})
    (out / "config.json").write_text(json.dumps(config))
    return out


def dequantized(folder: Path, dtype: torch.dtype) -> Any:
    """The same model without any packed weight: dequantized ones in plain transformers modules."""
    model = load(folder, device="cpu", dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
            plain.weight.data = module.dequantize(dtype)
            if module.bias is not None:
                plain.bias.data = module.bias.to(dtype)
            model.set_submodule(name, plain)
    return model


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return model(torch.randint(0, 256, (2, 24), generator=generator)).logits.float()


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


CASES = [
    ("llama", "compressed-tensors", integer(4, 32)),
    ("llama", "compressed-tensors", integer(4, 64, symmetric=False)),
    ("llama", "compressed-tensors", integer(8, CHANNEL)),
    ("llama", "gptq", integer(4, 128)),
    ("llama", "gptq", integer(4, 32, symmetric=False)),
    ("llama", "gptq_v2", integer(8, 32, symmetric=False)),
    ("qwen2", "compressed-tensors", integer(4, 32, symmetric=False)),
    ("qwen2", "gptq", integer(4, 32)),
    ("gemma3_text", "compressed-tensors", integer(4, 128)),
    ("gemma3_text", "gptq_v2", integer(4, 64)),
    ("mixtral", "compressed-tensors", integer(4, 32)),
    ("mixtral", "gptq", integer(8, CHANNEL)),
]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("load") / family, family)
        return made[family]

    return get


@pytest.mark.parametrize(
    ("family", "fmt", "scheme"), CASES, ids=lambda v: v.describe() if isinstance(v, LayerSpec) else v
)
def test_logits_are_those_of_the_dequantized_weights(family, fmt, scheme, sources, tmp_path):
    folder = quantize_folder(sources(family), tmp_path / "q", fmt, scheme)
    model = load(folder, device="cpu")
    count = sum(isinstance(m, QuantLinear) for m in model.modules())
    assert count == (2 * (4 + 3 * 4) if family == "mixtral" else 2 * 7)
    exact = logits(dequantized(folder, torch.float32))
    plain = logits(dequantized(folder, torch.bfloat16))
    assert rmse(logits(model), exact) <= 2 * rmse(plain, exact)
    assert rmse(logits(load(folder, device="cpu", dtype="float32")), exact) < 1e-4 * float(exact.std())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "mixtral"])
def test_plain_folder_is_transformers_own_load(family, sources):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(sources(family), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(load(sources(family), "cpu", "float32")), logits(theirs), atol=2e-5, rtol=1e-4)


def test_packed_weights_are_the_files_bytes(sources, tmp_path):
    folder = quantize_folder(sources("llama"), tmp_path / "q", "compressed-tensors", integer(4, 32))
    stored = load_file(folder / "model.safetensors")
    for name, module in load(folder, "cpu").named_modules():
        if isinstance(module, QuantLinear):
            weight = module.quantized()
            assert torch.equal(weight.packed, stored[f"{name}.weight_packed"])
            assert torch.equal(weight.scale, stored[f"{name}.weight_scale"])


def test_generate_eval_mode_and_kernel_line(sources, tmp_path, caplog):
    folder = quantize_folder(sources("llama"), tmp_path / "q", "gptq", integer(4, 32))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 259}))
    with caplog.at_level(logging.INFO, logger="qkit"):
        model = load(open_source(str(folder)), device="cpu")
    assert [r.message for r in caplog.records if "linears" in r.message and r.message.startswith("14 linears: ")]
    assert not model.training and model.dtype == torch.bfloat16
    out = model.generate(torch.tensor([[1, 2, 3]]), do_sample=False)
    assert out.shape == (1, 6)
    assert not any(p.requires_grad for p in model.parameters())


def test_tied_embeddings_stay_one(tmp_path):
    folder = make_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    model = load(folder, "cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()  # some writers store both
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(folder, "cpu")), logits(model))


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "has not: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"'model.norm.weight' has shape \[7\]"),
        (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(128, 3)}), f"{Q}.*weight_scale"),
        (lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 128])}), f"{Q}.*weight_packed"),
        (lambda t: t.update({"model.layers.9.x.weight_packed": t[f"{Q}.weight_packed"].clone()}), "layers.9.x"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(128, 128)}), f"has not: {Q}.weight"),
    ],
)
def test_every_tensor_is_accounted_for(edit, match, sources, tmp_path):
    folder = quantize_folder(sources("llama"), tmp_path / "q", "compressed-tensors", integer(4, 32))
    change(folder, edit)
    with pytest.raises(QkitError, match=match):
        load(folder, "cpu")


def test_recomputed_buffers_of_old_checkpoints_are_ignored(sources, tmp_path):
    folder = shutil.copytree(sources("llama"), tmp_path / "m")
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    load(folder, "cpu")


@pytest.mark.parametrize("argument", [{"device": "tpu"}, {"device": "cuda:99"}, {"dtype": "int8"}])
def test_bad_arguments(argument, sources):
    with pytest.raises(QkitError):
        load(sources("llama"), **argument)


def test_tokenizer_travels(sources, tmp_path):
    tokenizer = load_tokenizer(sources("llama"))
    assert tokenizer.decode(tokenizer("qkit ♥").input_ids) == "qkit ♥"
    bare = shutil.copytree(sources("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(QkitError, match="tokenizer"):
        load_tokenizer(bare)
