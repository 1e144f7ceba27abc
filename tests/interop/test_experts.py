"""Experts that the source has in one tensor, written one matrix each: vLLM's own loader makes the same of them."""

from __future__ import annotations

import pytest
import torch
from interop import clients
from models import make_model
from safetensors.torch import load_file

import qkit
from qkit import formats
from qkit.kernels.codes import values_of
from qkit.sources.folder import FolderSource

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
FAMILIES = {"qwen3_moe": "mlp", "granitemoe": "block_sparse_moe", "llama4_text": "feed_forward"}
CASES = [*((family, False) for family in FAMILIES), ("qwen3_moe", True)]


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """() -> name -> (our folder, what vLLM has of its experts)."""
    return clients.once(lambda: _loaded(tmp_path_factory.mktemp("experts")))


def _loaded(root):
    folders = {}
    for family, asymmetric in CASES:
        source = root / f"{family}-source"
        if not source.exists():
            make_model(source, family, save_original_format=False, **SIZES)
        name = f"{family}{'-asym' if asymmetric else ''}"
        scheme = "w4a16-asym" if asymmetric else "w4a16"
        folders[name] = qkit.convert(source, root / name, scheme=scheme, method="rtn", group_size=128).out
    job = {"folders": {name: str(folder) for name, folder in folders.items()}, "out": str(root)}
    clients.run("vllm", job, root, "client_vllm_experts.py")
    return {name: (folder, load_file(root / f"{name}.safetensors")) for name, folder in folders.items()}


@pytest.mark.parametrize(("family", "asymmetric"), CASES)
def test_experts_in_vllm(family: str, asymmetric: bool, loaded) -> None:
    folder, theirs = loaded()[f"{family}{'-asym' if asymmetric else ''}"]
    source = FolderSource(folder)
    reader = formats.reader(source.config)
    schemes = formats.quantized_modules(reader, source)
    assert len(theirs) == 4
    for layer in (0, 1):
        stem = f"model.layers.{layer}.{FAMILIES[family]}.experts"
        for e in range(4):
            gate, up, down = (
                values_of(formats.read_weight(reader, source, module, schemes[module]), torch.bfloat16)
                for module in (f"{stem}.{e}.{matrix}" for matrix in ("gate_proj", "up_proj", "down_proj"))
            )
            assert torch.equal(theirs[f"{stem}.w13"][e], torch.cat([gate, up]))
            assert torch.equal(theirs[f"{stem}.w2"][e], down)
