"""Tensors of all experts, sliced into one matrix each and put together again."""

from __future__ import annotations

import json

import pytest
import torch
from models import FUSED, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qkit.models import skeleton
from qkit.models.fused import find_fused
from qkit.sources.folder import FolderSource
from qkit.sources.sliced import Joined, sliced
from qkit.spec.dtypes import TensorMeta

TOKENS = torch.arange(3, 51).view(2, 24)
CASES = [(family, saved) for family in (*FUSED, "mixtral", "qwen3_moe") for saved in (True, False)]


@pytest.mark.parametrize(("family", "original"), CASES)
def test_the_model_with_one_matrix_per_expert(tmp_path, family, original):
    """Saved by transformers in both ways, it is the same model to the layers that quantizing needs."""
    folder = make_model(tmp_path / "m", family, save_original_format=original, dtype=torch.float32)
    source = FolderSource(folder)
    one_by_one = sliced(source) or source
    assert (one_by_one is source) == (original and family not in FUSED)
    model = skeleton.build(source.config)
    assert {name for name, _ in model.named_parameters()} == set(one_by_one.names())
    skeleton.materialize(model, one_by_one.read, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FUSED)
def test_put_together_again(tmp_path, family):
    source = FolderSource(make_model(tmp_path / "m", family))
    one_by_one = sliced(source)
    stems = sorted({fused.stem for fused in one_by_one.fused.values()})
    assert len(stems) == 2
    first = Joined(one_by_one, one_by_one, stems[:1])
    names = set(first.names())
    for name, fused in one_by_one.fused.items():
        parts = [part.name for part in fused.parts()]
        if fused.stem == stems[0]:
            assert name in names and names.isdisjoint(parts)
            assert first.meta(name) == source.meta(name) and torch.equal(first.read(name), source.read(name))
        else:
            assert name not in names and names.issuperset(parts)
            assert sum(one_by_one.meta(part).nbytes for part in parts) == source.meta(name).nbytes


def test_a_part_is_read_alone(tmp_path, monkeypatch):
    source = FolderSource(make_model(tmp_path / "m", "gpt_oss"))
    one_by_one = sliced(source)
    monkeypatch.setattr(source, "read", None)
    whole = load_file(tmp_path / "m" / "model.safetensors")
    for e in range(4):
        fused = whole["model.layers.1.mlp.experts.gate_up_proj"][e]
        assert torch.equal(one_by_one.read(f"model.layers.1.mlp.experts.{e}.up_proj.weight"), fused[:, 1::2].t())
        bias = whole["model.layers.1.mlp.experts.gate_up_proj_bias"][e]
        assert torch.equal(one_by_one.read(f"model.layers.1.mlp.experts.{e}.gate_proj.bias"), bias[::2])


def test_the_width_says_how_a_tensor_lies():
    """Both ways are seen by the model's width; where every side has it, the family decides."""
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def found(shape, kind):
        return find_fused({name: TensorMeta("BF16", shape)}, {"model_type": kind, "hidden_size": 64})

    assert not found((4, 96, 64), "qwen3_moe")[0].transposed
    assert found((4, 64, 96), "qwen3_moe")[0].transposed
    assert not found((4, 64, 64), "qwen3_moe")[0].transposed and found((4, 64, 64), "llama4_text")[0].transposed
    assert found((4, 96, 32), "qwen3_moe") == [] == found((4, 95, 64), "qwen3_moe")  # neither side; no two halves
    tower = "model.vision_tower.layers.0.mlp.experts.gate_up_proj"
    assert find_fused({tower: TensorMeta("BF16", (4, 96, 64))}, {"hidden_size": 64}) == []


def test_what_has_no_experts_is_left(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"model.layers.0.conv.weight": torch.zeros(2, 8, 8)}, tmp_path / "model.safetensors")
    assert sliced(FolderSource(tmp_path)) is None
