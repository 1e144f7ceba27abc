"""transformers' own from_pretrained after `import qkit`: packed linears, without the packages it asks for."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from peft import LoraConfig, get_peft_model
from results import QUICK
from safetensors.torch import load_file, save_file
from steps import steps_taken
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig
from transformers.quantizers import auto

import qkit
from qkit import transformers_hook
from qkit.errors import QkitError
from qkit.kernels import backend
from qkit.models.cache_name import cache_name
from qkit.runtime import QuantLinear
from qkit.runtime import transformers as transformers_quantizer
from qkit.runtime.transformers import NAME, QkitConfig, register_transformers

CASES = {
    "ct4": ("llama", "compressed-tensors", "w4a16", 32),
    "ct4-asym": ("qwen2", "compressed-tensors", "w4a16-asym", 64),
    "ct8-channel": ("gemma3_text", "compressed-tensors", "w8a16", 0),
    "gptq4": ("qwen2", "gptq", "w4a16", 32),
    "gptq8-v2": ("llama", "gptq_v2", "w8a16-asym", 64),
    "moe": ("mixtral", "compressed-tensors", "w4a16", 32),
    "awq4": ("llama", "awq", "w4a16-asym", 32),
    "w8a8": ("qwen2", "compressed-tensors", "w8a8", None),
    "fp8": ("llama", "compressed-tensors", "fp8", None),
    "nvfp4": ("llama", "compressed-tensors", "nvfp4a16", None),
    "nf4": ("llama", "bnb", "nf4", None),
    "nf4-dq": ("qwen2", "bnb", "nf4-dq", None),
    "int8": ("llama", "bnb", "int8", None),
    "kv": ("qwen3", "compressed-tensors", "w4a16", 32),
    "kv-window": ("gemma3_text", "compressed-tensors", "w8a8", None),
    "kv-moe": ("mixtral", "compressed-tensors", "fp8", None),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("transformers")
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        family, fmt, scheme, group_size = CASES[case]
        if family not in made:
            made[family] = make_model(root / family, family)
        if case not in made:
            made[case] = root / case
            more = {} if group_size is None else {"group_size": group_size}
            if case.startswith("kv"):
                more |= {"kv_cache": "fp8", **QUICK}
            qkit.convert(made[family], made[case], format=fmt, scheme=scheme, method="rtn", **more)
        return made[case]

    return get


@pytest.fixture
def tables(monkeypatch):
    """transformers' tables, put back afterwards; qkit asked to take both methods over."""
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    register_transformers()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 35).view(2, 16)).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def linears(model: Any) -> int:
    return sum(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_as_load(case, folders, tables):
    model = AutoModelForCausalLM.from_pretrained(folders(case))
    own = qkit.load(folders(case), device="cpu")
    assert linears(model) == linears(own) > 0
    assert not model.training and model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(own))
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("case", ["ct4", "gptq4"])
def test_device_map_and_dtype(device_map, case, folders, tables):
    model = AutoModelForCausalLM.from_pretrained(folders(case), device_map=device_map, dtype=torch.float32)
    assert torch.equal(logits(model), logits(qkit.load(folders(case), device="cpu", dtype="float32")))


@pytest.mark.parametrize("case", ["ct4-asym", "gptq8-v2", "moe", "awq4", "w8a8", "nvfp4", "nf4", "int8", "kv"])
def test_save_pretrained_writes_the_same_folder(case, folders, tables, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders(case))
    model.save_pretrained(tmp_path)
    before, after = (tensors(f) for f in (folders(case), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    given, written = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (folders(case), tmp_path)
    )
    assert written == given
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits after the last of ids' columns, the last four fed one by one."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :-4], use_cache=True)
        for i in range(ids.shape[1] - 4, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], use_cache=True, **{cache_name(): out[cache_name()]})
    return out.logits[:, -1].float()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 0.03


@pytest.fixture
def taken(monkeypatch):
    return steps_taken(monkeypatch)


def compiled(model: Any, tmp_path: Path) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def saved(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "saved")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def pickled(model: Any, tmp_path: Path) -> Any:
    torch.save(model, tmp_path / "model")
    return torch.load(tmp_path / "model", weights_only=False)


def adapted(model: Any, tmp_path: Path) -> Any:
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=32, init_lora_weights=False)
    return get_peft_model(model, qkit.lora(config)).eval()


# What is done with a model -> whether its fast step is one afterwards
DERIVED = {
    "itself": (lambda model, tmp_path: model, True),
    "deepcopy": (lambda model, tmp_path: copy.deepcopy(model), True),
    "torch.save": (pickled, True),
    "save_pretrained": (saved, True),
    "dequantize": (lambda model, tmp_path: model.dequantize(), True),
    "peft": (adapted, False),
    "compile": (compiled, False),
}


@pytest.mark.skipif(backend().startswith("torch"), reason="the fast step needs the C++ library")
@pytest.mark.parametrize("how", DERIVED)
@pytest.mark.parametrize("case", ["ct4", "ct8-channel"])
def test_from_pretrained_has_the_fast_step(case, how, folders, tables, tmp_path, taken):
    model = AutoModelForCausalLM.from_pretrained(folders(case))
    assert type(model).__name__ in ("LlamaForCausalLM", "Gemma3ForCausalLM")
    derive, fast = DERIVED[how]
    model = derive(model, tmp_path)
    ids = torch.randint(0, 250, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    taken.clear()
    assert close(steps(model, ids), expected)
    assert taken == ([False, True, True, True, True] if fast else len(taken) * [False])
    out = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, 73)


def test_double_quantization_is_not_saved_as_something_else(folders, tables, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        AutoModelForCausalLM.from_pretrained(folders("nf4-dq")).save_pretrained(tmp_path)


def test_generate_and_dequantize(folders, tables):
    model = AutoModelForCausalLM.from_pretrained(folders("ct4"))
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3
    packed = logits(AutoModelForCausalLM.from_pretrained(folders("ct4"), dtype=torch.float32))
    dense = AutoModelForCausalLM.from_pretrained(folders("ct4"), dtype=torch.float32).dequantize()
    assert linears(dense) == 0 and not getattr(dense.config, "quantization_config", None)
    torch.testing.assert_close(logits(dense), packed, atol=1e-5, rtol=1e-4)


def test_dequantized_nothing_is_rounded_any_more(folders, tables):
    dense = AutoModelForCausalLM.from_pretrained(folders("kv"), dtype=torch.float32).dequantize()
    assert not [name for name in dense.state_dict() if name.endswith("_scale")]
    rounded = logits(qkit.load(folders("kv"), device="cpu", dtype="float32"))
    assert not torch.allclose(logits(dense), rounded, atol=1e-5)


def test_a_folder_without_its_scales(folders, tables, tmp_path):
    folder = edit_config(folders("kv"), tmp_path / "kv")
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    kept = {name: t for name, t in tensors(folders("kv")).items() if not name.endswith("1.self_attn.v_scale")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QkitError, match="holds 3 scales of the KV cache where Qwen3ForCausalLM has 4"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_base_model_without_a_head(folders, tables):
    """Names in the file have a prefix that the modules lack."""
    model = AutoModel.from_pretrained(folders("ct4"))
    assert linears(model) == 14 and not any(b.is_meta for b in model.buffers())


def edit_config(folder: Path, out: Path, **changes: Any) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_folder_that_contradicts_its_config(folders, tables, tmp_path):
    asym = edit_config(folders("gptq8-v2"), tmp_path / "sym", sym=True)
    with pytest.raises(QkitError, match=r"model\.layers\.0\.\S+: the config says symmetric"):
        AutoModelForCausalLM.from_pretrained(asym)


def test_what_qkit_does_not_read_is_left_to_transformers(tables):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "format": "marlin"}
    assert type(auto.AutoQuantizationConfig.from_dict(config)).__name__ == "GPTQConfig"
    assert isinstance(auto.AutoQuantizationConfig.from_dict({**config, "format": "gptq"}), QkitConfig)


def test_offloading_to_disk_is_refused(folders, tables):
    with pytest.raises(QkitError, match="disk"):
        AutoModelForCausalLM.from_pretrained(folders("ct4"), device_map={"": "disk"})


def test_registers_once(tables):
    register_transformers()
    entry = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    register_transformers()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is entry and NAME in auto.AUTO_QUANTIZER_MAPPING


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(["compressed_tensors"]))  # as if not installed
import qkit
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, len(sys.meta_path))
"""


def test_import_is_enough(folders):
    """Before transformers is imported, and without importing it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(folders("ct4")))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "QuantLinear"
    assert "not registered" not in done.stderr


def test_import_after_transformers_takes_over_only_what_it_cannot_load(monkeypatch):
    own = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    own |= {"gptq": GPTQConfig, "compressed-tensors": CompressedTensorsConfig}
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", own)
    monkeypatch.setattr(transformers_quantizer, "_METHODS", {"compressed-tensors": lambda: True, "gptq": lambda: False})
    transformers_hook.install()
    assert own["compressed-tensors"] is CompressedTensorsConfig
    assert type(own["gptq"]).__name__ == "_Either" and own["gptq"].other is GPTQConfig
