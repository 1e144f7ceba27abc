"""vLLM with torch.compile, and the models that it has compiled before: without qkit, then with it, in one cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from interop import clients
from models import make_model

import qkit

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
TOKENS = [list(range(5, 37)), list(range(100, 132))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clients.needs_vllm_kernels()
    clients.once(clients.python_of)("vllm")  # skips where nothing can be installed
    return clients.install_qkit(tmp_path_factory.mktemp("vllm") / "site")


@pytest.mark.parametrize("fmt, scheme", [("gptq", "w4a16"), ("awq", "w4a16-asym")])
def test_what_was_compiled_without_qkit_is_compiled_anew(fmt: str, scheme: str, site: Path, tmp_path: Path) -> None:
    """What was compiled reads weights that lie elsewhere by now. On CPUs vLLM 0.32 loads nothing that it saved
    ("Compiling model again due to a load failure"), so that here the names alone show which model it would find."""
    source = make_model(tmp_path / "source", **SHAPE)
    folder = tmp_path / "folder"
    qkit.convert(str(source), folder, format=fmt, scheme=scheme, method="rtn", group_size=64)
    found = {}
    for name, switch in (("without", "0"), ("with", "1")):
        job = {"folders": {name: str(folder)}, "tokens": TOKENS, "out": str(tmp_path), "compile": [name]}
        clients.run("vllm", job, tmp_path, extra={"PYTHONPATH": str(site), "QKIT_VLLM": switch})
        kinds = json.loads((tmp_path / f"{name}.kernels.json").read_text())
        assert any(kind.startswith("qkit ") for kind in kinds) == (name == "with") and sum(kinds.values()) == 8
        found[name] = torch.tensor(json.loads((tmp_path / f"{name}.json").read_text()))[..., 0]
    assert float((found["with"] - found["without"]).abs().max()) < 0.1
    models = list((tmp_path / "cache" / "vllm" / "torch_compile_cache" / "torch_aot_compile").iterdir())
    assert len(models) == 2
