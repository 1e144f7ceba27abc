"""build + materialize gives the model that transformers itself loads."""

from __future__ import annotations

import json

import pytest
import torch
from models import FUSED  # their files are read through a slicing source: tests/sources/test_sliced.py
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qkit.errors import QkitError
from qkit.models import skeleton

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXTRA = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0],
    },
}  # fmt: skip
MOE = ("mixtral", "qwen2_moe", "qwen3_moe")


def tiny(model_type: str, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **EXTRA.get(model_type, {}), **more})
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms are all ones and routers all zeros otherwise
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def filled(folder, **options):
    tensors = load_file(folder / "model.safetensors")
    model = skeleton.build(json.loads((folder / "config.json").read_text()))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name for name, _ in model.named_parameters()} == set(tensors)
    skeleton.materialize(model, tensors.__getitem__, **options)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", [kind for kind in skeleton.ARCHITECTURES if kind not in FUSED])
def test_equals_transformers(tmp_path, model_type, tie):
    tiny(model_type, tie_word_embeddings=tie).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = filled(tmp_path)
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    if tie:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = model(tokens).logits, expected(tokens).logits
    if model_type in MOE:  # fused and unfused experts differ in the order of additions
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, want)
        with torch.no_grad():
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
            assert torch.equal(generated, expected.generate(tokens, max_new_tokens=4, do_sample=False))


def test_bfloat16_and_buffers(tmp_path):
    tiny("gemma3_text").save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = filled(tmp_path, dtype=torch.bfloat16)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    buffers, wanted = dict(model.named_buffers()), dict(expected.named_buffers())
    assert set(buffers) == set(wanted)
    for name, buffer in buffers.items():
        assert torch.equal(buffer.float(), wanted[name].float()), name


def test_block_by_block_and_back(tmp_path):
    source = tiny("llama")
    tensors = dict(source.state_dict())
    model = skeleton.build(source.config)
    block = model.model.layers[1]
    skeleton.materialize(block, tensors.__getitem__, "model.layers.1.", torch.float32)
    assert not any(parameter.is_meta for parameter in block.parameters())
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(block.mlp.up_proj.weight, tensors["model.layers.1.mlp.up_proj.weight"])
    skeleton.dematerialize(block)
    assert all(parameter.is_meta for parameter in block.parameters())


def test_unreached_expert_is_not_called():
    model = tiny("mixtral")
    unfused = skeleton.build(model.config)
    experts = unfused.model.layers[0].block_sparse_moe.experts
    skeleton.materialize(experts[1], lambda name: torch.ones(64, 96) if "w2" in name else torch.ones(96, 64))
    x = torch.randn(5, 64)
    out = experts(x, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1))  # calling one on meta would fail
    assert out.shape == x.shape and not out.is_meta


def test_errors():
    with pytest.raises(QkitError, match="no model_type"):
        skeleton.build({})
    with pytest.raises(QkitError, match="mamba") as caught:
        skeleton.build({"model_type": "mamba"})
    assert "rtn" in caught.value.hint
    with pytest.raises(QkitError, match="cannot build"):
        skeleton.build({"model_type": "llama", **SMALL, "num_attention_heads": "many"})
    model = skeleton.build(tiny("llama").config)

    def missing(name: str) -> torch.Tensor:
        raise KeyError(name)

    with pytest.raises(QkitError, match=r"lacks tensor 'model\.embed_tokens"):
        skeleton.materialize(model, missing)
    with pytest.raises(QkitError, match="its config says"):
        skeleton.materialize(model, lambda name: torch.zeros(3))
