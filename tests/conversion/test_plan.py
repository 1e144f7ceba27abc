from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkit.conversion.options import Options
from qkit.conversion.plan import make_plan
from qkit.conversion.render import describe
from qkit.conversion.tasks import Task, make_shards
from qkit.errors import QkitError
from qkit.models.config import model_dtype
from qkit.sources.types import Stored
from qkit.spec.dtypes import TensorMeta


class Stub:
    """A Source made of names alone: a plan must not read a tensor."""

    label = base_model = "stub"
    sidecars = ()
    fingerprint = "0"
    folder, metadata = None, {}
    stored = Stored(0, {}, False)

    def __init__(self, shapes: dict[str, tuple[int, ...]], config: dict | None = None):
        self.shapes, self.config = shapes, config or {"model_type": "llama", "num_hidden_layers": 1}

    def names(self) -> list[str]:
        return sorted(self.shapes)

    def meta(self, name: str) -> TensorMeta:
        return TensorMeta("BF16", self.shapes[name])

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("a plan reads no tensor")


LAYER = {
    "model.embed_tokens.weight": (1000, 576),
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.self_attn.q_proj.bias": (576,),
    "model.layers.0.mlp.down_proj.weight": (576, 1536),
}


def plan(shapes=LAYER, out=Path("/tmp/never"), config=None, **options):
    return make_plan(Stub(shapes, config), out, Options(**{"method": "rtn", **options}))


def test_sizes_are_exact():
    p = plan()
    weights = 576 * 576 + 576 * 1536
    packed = weights // 2 + 2 * weights // 64 + 2 * 2 * 8  # nibbles, bfloat16 scales per 64, two weight_shape pairs
    assert p.bytes_in == 2 * (1000 * 576 + 576 + weights)
    assert p.bytes_out == packed + 2 * (1000 * 576 + 576)
    assert p.bits_per_quantized_weight == pytest.approx(8 * packed / weights)
    assert p.kinds[0].group_size == 64 and any("largest of 128, 64, 32" in n for n in p.notes)
    assert p.ignored == ["lm_head"]  # tied: not in the checkpoint, but a linear to every engine


def test_the_plan_says_why_each_tensor_is_kept():
    text = describe(plan(skip=("*.down_proj",)))
    for part in ("embedding", "bias or norm", "skipped on request", "int4 symmetric g64", "predicted:"):
        assert part in text
    assert plan(skip=("*.down_proj",)).ignored == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert plan({**LAYER, "lm_head.weight": (1000, 576)}).ignored == ["lm_head"]


def test_eight_bits_default_to_rounding_and_four_to_gptq():
    stub = Stub(LAYER, {"model_type": "llama", "num_hidden_layers": 1})
    assert make_plan(stub, Path("/tmp/never"), Options(scheme="w8a16")).method.name == "rtn"
    with pytest.raises(QkitError, match="'frobnicator' is not supported"):
        make_plan(Stub(LAYER, {"model_type": "frobnicator"}), Path("/tmp/never"), Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 128}, "group size 128 does not divide .*576 wide"),
        ({"format": "gptq", "shapes": {"model.layers.0.x_proj.weight": (100, 64)}}, "divisible by 32"),
        ({"config": {"model_type": "gpt2"}}, "gpt2"),
        (
            {"config": {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}},
            "'aqlm' is not supported",
        ),
        ({"config": {"model_type": "llama", "num_hidden_layers": 3}}, "block 1, 2 are missing"),
        ({"out": Path("/proc/nowhere")}, "cannot write into|are free there"),
        ({"max_memory": 1000}, "--max-memory allows"),
        ({"shapes": {"model.embed_tokens.weight": (10, 10)}}, "no tensor of this checkpoint"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(QkitError, match=message):
        plan(**changes)


def test_shards_keep_order_and_size():
    tensors = [
        Task((f"t{i}",), TensorMeta("U8", (n,)), None, "", ((f"t{i}", TensorMeta("U8", (n,))),))
        for i, n in enumerate([40, 40, 40, 500, 10])
    ]
    shards = make_shards(tensors, limit=100)
    assert [[t.name for t in s.tasks] for s in shards] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert [s.file for s in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"torch_dtype": "bfloat16"}, "BF16"),
        ({"text_config": {"dtype": "float32"}}, "F32"),
        ({}, "BF16"),
    ],
)
def test_model_dtype(config, expected):
    assert model_dtype(config) == expected
