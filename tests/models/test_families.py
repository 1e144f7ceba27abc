import pytest

from qkit.models.families import why_kept
from qkit.spec.dtypes import TensorMeta


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), None),
        ("model.layers.11.mlp.experts.3.w1.weight", (64, 64), None),
        ("model.language_model.layers.3.mlp.down_proj.weight", (64, 64), None),
        ("transformer.h.0.attn.q_proj.weight", (64, 64), None),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "bias or norm"),
        ("model.layers.0.input_layernorm.weight", (64,), "bias or norm"),
        ("model.embed_tokens.weight", (1000, 64), "embedding"),
        ("lm_head.weight", (1000, 64), "output head"),
        ("model.layers.0.mlp.gate.weight", (8, 64), "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "router"),
        ("model.layers.0.mlp.gate_proj.weight", (64, 64), None),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 64), "fused 3-D experts"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", (64, 64), "vision or audio tower"),
        ("visual.blocks.0.attn.qkv.weight", (64, 64), "vision or audio tower"),
        ("model.projector.weight", (64, 64), "outside the decoder blocks"),
        ("model.layers.0.conv.weight", (64, 1, 4), "3-D, not a linear weight"),
    ],
)
def test_what_is_quantized(name, shape, reason):
    assert why_kept(name, TensorMeta("BF16", shape)) == reason


def test_integer_weights_are_kept():
    assert why_kept("model.layers.0.x_proj.weight", TensorMeta("I8", (64, 64))) == "stored as I8"
