"""What a config.json says: our own, other writers', and broken ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import random_weight, same

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.formats.base import column_order
from qkit.formats.expanded import Expanded
from qkit.spec import CHANNEL, LayerSpec, integer
from qkit.spec.dtypes import TensorMeta, dtype_name

SCHEMES = [integer(b, g, s) for b in (4, 8) for g in (CHANNEL, 64) for s in (True, False)]
LLM_COMPRESSOR = {  # the keys llm-compressor 0.14 writes
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group",
                "symmetric": True, "type": "int", "zp_dtype": None,
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
}  # fmt: skip
AUTO_GPTQ = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
             "true_sequential": True, "model_file_base_name": "model"}  # fmt: skip
GPTQ = {**AUTO_GPTQ, "quant_method": "gptq", "dynamic": {"-:a": {}}, "checkpoint_format": "gptq", "pack_dtype": "int32"}


def reader(config: dict[str, Any]) -> formats.FormatReader:
    found = formats.reader({"quantization_config": config})
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=LayerSpec.describe)
def test_own_config_is_read_back(name, scheme):
    fmt = formats.get(name)
    config = json.loads(json.dumps(fmt.config({"model.layers.0.a": scheme}, ["lm_head", "model.layers.0.gate"], {})))
    found = reader(config)
    assert found.format == fmt
    read = found.scheme("model.layers.0.a")
    assert read is not None and (read.bits, read.group_size, read.symmetric) == (
        scheme.bits, scheme.group_size, scheme.symmetric,
    )  # fmt: skip
    assert found.scheme("model.layers.0.gate") is None


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_mixed_schemes_are_read_back(name):
    schemes = {f"model.layers.{i}.mlp.up": SCHEMES[i % len(SCHEMES)] for i in range(12)}
    found = reader(formats.get(name).config(schemes, ["lm_head"], {}))
    for module, scheme in schemes.items():
        read = found.scheme(module)
        assert read is not None and (read.bits, read.group_size, read.symmetric) == (
            scheme.bits, scheme.group_size, scheme.symmetric,
        )  # fmt: skip


def test_compressed_tensors_package_accepts_the_config():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for schemes in ({"a": SCHEMES[0]}, {str(i): s for i, s in enumerate(SCHEMES)}):
        config = formats.get("compressed-tensors").config(schemes, ["lm_head"], {})
        parsed = quantization.QuantizationConfig.model_validate(config)
        groups = list(parsed.config_groups.values())
        assert parsed.quantization_status.value == "compressed" and parsed.ignore == ["lm_head"]
        assert len(groups) == len(schemes) and all(g.format == "pack-quantized" for g in groups)


def test_gptq_quantize_config_is_config_json_s():
    config = formats.get("gptq").config({"m": integer(4, 128)}, ["lm_head"], {"damp_percent": 0.05, "desc_act": True})
    files = formats.get("gptq").extra_files(config)
    assert json.loads(files["quantize_config.json"]) == config
    assert config["desc_act"] is False and config["lm_head"] is False and config["checkpoint_format"] == "gptq"
    assert config["meta"]["damp_percent"] == 0.05 and config["meta"]["quantizer"][0].startswith("qkit:")
    assert "dynamic" not in config
    assert formats.get("compressed-tensors").extra_files({}) == {}


def test_llm_compressor_config():
    found = reader(LLM_COMPRESSOR)
    assert found.scheme("model.layers.3.mlp.up_proj") == integer(4, 128)
    assert found.scheme("lm_head") is None
    assert found.scheme("model.layers.3.mlp.gate") is None
    assert found.scheme("model.layers.3.mlp.gate_proj") == integer(4, 128)


def test_compressed_tensors_targets_by_name_and_pattern():
    config: dict[str, Any] = copy.deepcopy(LLM_COMPRESSOR)
    second = copy.deepcopy(config["config_groups"]["group_0"])
    second["targets"], second["weights"]["num_bits"] = ["re:.*down_proj$"], 8
    third = copy.deepcopy(second)
    third["targets"], third["weights"]["symmetric"] = ["model.layers.0.mlp.down_proj"], False
    config["config_groups"].update(group_1=second, group_2=third)
    found = reader(config)
    assert found.scheme("model.layers.0.mlp.up_proj") == integer(4, 128)
    assert found.scheme("model.layers.1.mlp.down_proj") == integer(8, 128)
    assert found.scheme("model.layers.0.mlp.down_proj") == integer(8, 128, symmetric=False)


def test_auto_gptq_config_without_method_or_version():
    found = reader(AUTO_GPTQ)
    assert found.format.name == "gptq"
    assert found.scheme("x") == integer(4, 128, True, "F16")
    without_sym = {k: v for k, v in AUTO_GPTQ.items() if k != "sym"}
    assert reader(without_sym).scheme("x") == integer(4, 128, False, "F16")  # the zeros on disk decide


def test_gptqmodel_dynamic():
    config = {**AUTO_GPTQ, "quant_method": "gptq", "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
              "dynamic": {r"-:.*\.gate$": {}, r"+:.*\.1\.": {"bits": 8, "group_size": 64},
                          r".*\.2\.": {"sym": False}}}  # fmt: skip
    found = reader(config)
    assert found.format.name == "gptq_v2"
    assert found.scheme("model.layers.1.gate") is None
    assert found.scheme("model.layers.1.up") == integer(8, 64, True, "F16")
    assert found.scheme("model.layers.2.up") == integer(4, 128, False, "F16")
    assert found.scheme("model.layers.3.up") == integer(4, 128, True, "F16")


def test_nothing_quantized():
    assert formats.reader({}) is None
    assert formats.reader({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": None}, "None"),
        ({"config_groups": {}}, "config_groups"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ({"transform_config": {"config_groups": {"a": {}}}}, "transforms"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}, "format": "marlin-24"}, "marlin-24"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "does not quantize weights"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}}}}, "3-bit"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "tensor"}}}}, "tensor"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"},
                                     "input_activations": {"num_bits": 8}}}},
            "activations",
        ),
    ],
)  # fmt: skip
def test_unsupported_compressed_tensors(change, match):
    with pytest.raises(QkitError, match=match):
        reader({**LLM_COMPRESSOR, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "5-bit"),
        ({"bits": "4"}, "integers"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"pack_dtype": "int16"}, "int16"),
        ({"group_size": 0.5}, "integers"),
    ],
)
def test_unsupported_gptq(change, match):
    with pytest.raises(QkitError, match=match):
        reader({**AUTO_GPTQ, **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([LLM_COMPRESSOR, GPTQ]), st.data())
def test_any_config_is_read_or_refused(base, data):
    """One value anywhere in a real config replaced by anything: read, or a QkitError; never another exception."""
    config = copy.deepcopy(base)
    owner, key = data.draw(st.sampled_from(list(_places(config))))
    owner[key] = data.draw(JSON)
    try:
        found = formats.reader({"quantization_config": config})
        if found is not None:
            found.scheme("model.layers.0.mlp.up_proj")
    except QkitError:
        pass


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from _places(child)


class FakeSource:
    label, base_model, sidecars, fingerprint = "fake", "fake", (), ""
    stored, folder, metadata = None, None, {}  # type: ignore[var-annotated]

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]):
        self.tensors, self.config = tensors, config

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def meta(self, name: str) -> TensorMeta:
        return TensorMeta(dtype_name(self.tensors[name].dtype), tuple(self.tensors[name].shape))

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_modules_of_a_source(name):
    fmt = formats.get(name)
    scheme = fmt.scheme_for(integer(4, 32, symmetric=False), "BF16")
    q = random_weight(64, 96, scheme)
    tensors = {f"a.b.{k}": v for k, v in fmt.pack(q).items()} | {"norm.weight": torch.ones(4)}
    config = {"quantization_config": fmt.config({"a.b": scheme}, ["lm_head"], {})}
    source = FakeSource(tensors, config)
    found = formats.reader(config)
    modules = formats.quantized_modules(found, source)
    assert list(modules) == ["a.b"] and modules["a.b"].scale_dtype == scheme.scale_dtype
    assert same(formats.read_weight(found, source, "a.b", modules["a.b"]), q)

    ignored = formats.reader({"quantization_config": fmt.config({"x": scheme}, ["a.b"], {})})
    with pytest.raises(QkitError, match="config says"):
        formats.quantized_modules(ignored, source)
    scale = "a.b.scales" if name == "gptq" else "a.b.weight_scale"
    broken = FakeSource({k: v for k, v in tensors.items() if k != scale}, config)
    with pytest.raises(QkitError, match=scale):
        formats.quantized_modules(found, broken)


@pytest.mark.parametrize(("name", "local"), [("compressed-tensors", "weight_shape"), ("gptq", "qweight"),
                                             ("awq", "qweight")])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)])
def test_codes_that_are_no_matrix(name, local, shape):
    fmt = formats.get(name)
    scheme = fmt.scheme_for(integer(4, 32, symmetric=False), "BF16")
    tensors = {f"a.b.{k}": v for k, v in fmt.pack(random_weight(64, 96, scheme)).items()}
    tensors[f"a.b.{local}"] = torch.ones(shape, dtype=tensors[f"a.b.{local}"].dtype)
    source = FakeSource(tensors, {"quantization_config": fmt.config({"a.b": scheme}, [], {})})
    with pytest.raises(QkitError, match=r"dimensions|shape of a linear"):
        Expanded(source)


def test_other_formats_codes_that_are_no_matrix():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {"a.b.weight": torch.ones(128).to(torch.float8_e4m3fn), "a.b.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(QkitError, match="not two dimensions"):
        Expanded(FakeSource(tensors, {"quantization_config": fp8}))
    bytes_ = torch.ones(32, dtype=torch.uint8)
    with pytest.raises(QkitError, match="not three dimensions"):
        Expanded(
            FakeSource({"a.b.blocks": bytes_, "a.b.scales": bytes_}, {"quantization_config": {"quant_method": "mxfp4"}})
        )
    int8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    tensors = {"a.b.weight": torch.ones(4, 8, dtype=torch.int8), "a.b.SCB": torch.ones(4), "a.b.weight_format": bytes_}
    with pytest.raises(QkitError, match="weight_format"):
        Expanded(FakeSource(tensors, {"quantization_config": int8})).read("a.b.weight")


@pytest.mark.parametrize("rows", [64, 65, 1 << 31, 10**400])
def test_a_block_of_more_rows_than_there_are(rows):
    config = {"quant_method": "fp8", "weight_block_size": [rows, 32]}
    weight = torch.arange(64 * 32).view(64, 32).float().to(torch.float8_e4m3fn)
    tensors = {"a.b.weight": weight, "a.b.weight_scale_inv": torch.full((1, 1), 2.0)}
    found = Expanded(FakeSource(tensors, {"quantization_config": config, "dtype": "float32"})).read("a.b.weight")
    assert torch.equal(found, weight.float() * 2)


def test_scales_of_another_kind_of_weight():
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "format": "mxfp4-pack-quantized"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    packed, scale = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2)
    for dtype in (torch.float8_e4m3fn, torch.float32):
        tensors = {"a.b.weight_packed": packed, "a.b.weight_scale": scale.to(dtype)}
        with pytest.raises(QkitError, match=r"which no scale of mxfp4 is|scale dtype"):
            Expanded(FakeSource(tensors, {"quantization_config": config}))


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_a_group_that_is_none_is_not_counted_up_to(group):
    g_idx = torch.arange(96) // 32
    g_idx[5] = group
    with pytest.raises(QkitError, match="does not divide 96 inputs"):
        column_order(g_idx, integer(4, 32))


SLOW = "((.|.)+)+[^a-z0-9_.]"


@pytest.mark.parametrize(
    "config",
    [{**LLM_COMPRESSOR, "ignore": [f"re:{SLOW}"]}, {**GPTQ, "dynamic": {f"-:{SLOW}": {}}}],
    ids=["compressed-tensors", "gptq"],
)
def test_a_pattern_made_to_stall_is_refused(config, monkeypatch):
    monkeypatch.setattr("qkit.untrusted.PATTERN_SECONDS", 0.1)
    with pytest.raises(QkitError, match="takes more than"):
        reader(config).scheme("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("bits", ["4", None, [], 4.0, float("inf")])
def test_auto_round_says_its_bits_in_whole_numbers(bits):
    given = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    with pytest.raises(QkitError):
        reader({**given, "extra_config": {"lm_head": {"bits": bits}}})
    with pytest.raises(QkitError, match="dynamic"):
        reader({**given, "dynamic": [1]})


def test_numbers_that_json_does_not_have():
    with pytest.raises(QkitError, match="not finite"):
        reader({**AUTO_GPTQ, "damp_percent": float("nan")})


def test_folders_of_old_writers(llama, tmp_path):
    """Settings in quantize_config.json alone (AutoGPTQ), and AutoRound's names for AutoGPTQ's packing."""
    out = qkit.convert(llama, tmp_path / "out", format="gptq", method="rtn", group_size=32).out
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = qkit.load(out, device="cpu")(tokens).logits

        def loads(quantization, alone):
            merged = config if quantization is None else {**config, "quantization_config": quantization}
            (out / "config.json").write_text(json.dumps(merged))
            (out / "quantize_config.json").unlink(missing_ok=True)
            if alone is not None:
                (out / "quantize_config.json").write_text(json.dumps(alone))
            assert torch.equal(qkit.load(out, device="cpu")(tokens).logits, expected)

        loads(None, settings)
        loads(None, {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "model_file_base_name": None})
        auto_round = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "sym": True}
        loads({**auto_round, "group_size": 32, "extra_config": {"lm_head": {"bits": 16}}}, None)
        named = {"model.layers.0.self_attn.q_proj": {"bits": 4, "group_size": 32, "sym": True}}
        loads({**auto_round, "group_size": 32, "extra_config": named}, None)
    with pytest.raises(QkitError, match="packing_format"):
        reader({**auto_round, "packing_format": "auto_round"})
