import pytest

from qkit.errors import QkitError
from qkit.models.families import check_skip, chooser, pick_group_size
from qkit.spec import CHANNEL, integer
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
    choice = chooser(integer())(name, TensorMeta("BF16", shape))
    assert choice == (integer() if reason is None else reason)


def test_integer_weights_are_left_alone():
    assert chooser(integer())("model.layers.0.x_proj.weight", TensorMeta("I8", (64, 64))) == "stored as I8"


def test_skip_patterns():
    choose = chooser(integer(), ["*.down_proj", "model.layers.0.*"])
    meta = TensorMeta("BF16", (64, 64))
    assert choose("model.layers.1.mlp.down_proj.weight", meta) == "skipped on request"
    assert choose("model.layers.0.mlp.up_proj.weight", meta) == "skipped on request"
    assert choose("model.layers.1.mlp.up_proj.weight", meta) == integer()
    with pytest.raises(QkitError, match="matches no tensor"):
        check_skip(["*.dwon_proj"], ["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(("widths", "expected"), [((128, 256), 128), ((576, 1536), 64), ((96,), 32)])
def test_largest_group_that_divides_all(widths, expected):
    shapes = {f"l{i}": (8, w) for i, w in enumerate(widths)}
    assert pick_group_size(integer(), None, shapes).group_size == expected


def test_group_sizes_that_do_not_divide_are_refused():
    with pytest.raises(QkitError) as e:
        pick_group_size(integer(), 128, {"a": (8, 576), "b": (8, 1536)})
    assert "a, which is 576 wide" in e.value.message
    assert e.value.hint == "sizes that divide every quantized layer: 64, 32, channel"
    with pytest.raises(QkitError, match="100 wide"):
        pick_group_size(integer(), None, {"a": (8, 100)})
    with pytest.raises(QkitError, match="group size 7"):
        pick_group_size(integer(), 7, {"a": (8, 700)})
    assert pick_group_size(integer(), CHANNEL, {"a": (8, 100)}).group_size == CHANNEL
