"""bitsandbytes' formats written: against plain loops, round trips, and from end to end. bitsandbytes itself is asked in
tests/interop/test_bitsandbytes.py."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of
from qkit.kernels.weight import TABLES
from qkit.methods import METHODS
from qkit.methods.tables import dynamic_map, int8, table_codes
from qkit.runtime import QuantLinear
from qkit.spec import Scale, llm_int8, table
from qkit.spec.dtypes import dtype_name

DOUBLE = Scale((1, 256), "F32")


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]), block=st.sampled_from([32, 64, 256]), double=st.booleans(),
    rows=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip(kind, block, double, rows, blocks, seed):
    spec = table(kind, block, over=DOUBLE if double else None)
    w = torch.randn(rows, block * blocks, generator=torch.Generator().manual_seed(seed)).bfloat16()
    (done,) = METHODS["rtn"].quantize([w], None, [spec])
    fmt = formats.get("bnb")
    tensors = fmt.pack(done.weight)
    metas = fmt.out_metas((rows, block * blocks), spec)
    assert {k: (dtype_name(t.dtype), tuple(t.shape)) for k, t in tensors.items()} == {
        k: (m.dtype, m.shape) for k, m in metas.items()
    }
    again = fmt.unpack(tensors, spec)
    assert torch.equal(values_of(again), values_of(done.weight))
    assert torch.equal(codes_of(again), codes_of(done.weight))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_the_nearest(kind):
    """Of the table, times the absolute maximum of the block."""
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    w[3, :64] = 0
    q = table_codes(w, table(kind))
    values = torch.tensor(TABLES[kind])
    absmax = w.view(16, 2, 64).abs().amax(-1)
    assert torch.equal(q.scale, absmax)
    for o in range(16):
        for i in range(128):
            scale = absmax[o, i // 64]
            best = float((values * scale - w[o, i]).abs().min())
            found = float((values[codes_of(q)[o, i].int()] * scale - w[o, i]).abs())
            assert found <= best + 1e-6


def test_the_dynamic_type():
    values = dynamic_map()
    assert len(values) == 256 and torch.equal(values, values.sort().values)
    assert float(values[0]) == pytest.approx(-0.9929687) and float(values[-1]) == 1.0 and 0.0 in values.tolist()


def test_int8_is_exact_to_half_a_step():
    w = torch.randn(24, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[5] = 0
    q = int8(w)
    step = w.abs().amax(1, keepdim=True).float() / 127
    assert bool(((values_of(q) - w.float()).abs() <= step / 2 + 1e-6).all())
    fmt = formats.get("bnb")
    again = fmt.unpack(fmt.pack(q), llm_int8())
    assert torch.equal(again.packed, q.packed) and torch.equal(again.scale, q.scale)
    with pytest.raises(QkitError, match="does not fit float16"):
        int8(torch.full((2, 8), 1e5))


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp4", "int8"])
def test_a_folder_from_end_to_end(scheme, tmp_path):
    source = make_model(tmp_path / "source")
    qkit.convert(source, tmp_path / "out", format="bnb", scheme=scheme)
    found = inspect(str(tmp_path / "out"), verify=True)
    assert found.problems == [] and sum(found.schemes.values()) == 14
    assert found.parameters == inspect(str(source)).parameters
    model = qkit.load(tmp_path / "out", device="cpu")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = qkit.load(source, device="cpu")(tokens).logits.float()
        logits = model(tokens).logits.float()
    # Of random logits: bounds that fail for a wrong table, order or scale.
    assert float((logits - expected).norm() / expected.norm()) < (0.02 if scheme == "int8" else 0.35)


def test_block_sizes(llama, tmp_path):
    qkit.convert(llama, tmp_path / "out", format="bnb", scheme="nf4", block_size=128)
    assert inspect(str(tmp_path / "out")).parameters == inspect(str(llama)).parameters
    for options, message in (
        ({"group_size": 64}, "no groups"),
        ({"block_size": 48}, "no blocks of 48"),
        ({"block_size": 256}, "do not divide its 128 inputs"),
        ({"scheme": "int8", "block_size": 64}, "belongs to nf4 and fp4"),
        ({"scheme": "int8", "group_size": 64}, "no group size to choose"),
        ({"method": "gptq"}, "gptq makes integer weights"),
        ({"scheme": "w4a16"}, "bnb does not hold int4"),
    ):
        with pytest.raises(QkitError, match=message):
            qkit.convert(llama, tmp_path / "no", format="bnb", dry_run=True, **{"scheme": "nf4", **options})


def test_experts_stay_and_it_is_said(tmp_path):
    source = make_model(tmp_path / "source", "mixtral")
    plan = qkit.convert(source, tmp_path / "out", format="bnb", dry_run=True).plan
    assert any("WARNING: 24 matrices of experts" in note for note in plan.notes)
    assert {name.split(".")[-2] for name in plan.schemes} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_float32_norms_get_the_models_type(tmp_path):
    """Clients compute in one type: of a GGUF file, whose norms are float32, bitsandbytes' own modules would fail."""
    qkit.convert("demo", tmp_path / "out", format="bnb", scheme="nf4", dry_run=False)
    assert "F32" not in {d for d, n in inspect(str(tmp_path / "out")).dtypes.items() if n == 61}
    assert inspect(str(tmp_path / "out")).dtypes["BF16"] == 62
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
