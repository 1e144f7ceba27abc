"""Our NF4, FP4 and LLM.int8() folders: equal to what bitsandbytes and transformers write, and loaded by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interop import clients
from interop.test_clients import rmse
from models import make_model
from safetensors.torch import load_file, save_file

import qkit
from qkit.text.defaults import evaluation_text
from qkit.text.tokenizer import load_tokenizer

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
# scheme -> arguments of BitsAndBytesConfig
SCHEMES = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
SMOL = ("nf4", "nf4-dq", "fp4", "int8")


class Bench:
    def __init__(self, root: Path):
        self.root = root
        self.out = clients.once(self._out)

    def source(self) -> Path:
        """Random weights with what is at the ends: zero rows and blocks, one sign, powers of two, ties."""
        source = make_model(self.root / "source")
        tensors = load_file(source / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensor[1, 64:] = 0
                tensor[2] = tensor[2].abs()
                tensor[3] = torch.arange(tensor.shape[1]).bfloat16() / 64
                tensor[4] *= 1e-3
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        return source

    def tokens(self) -> list[list[int]]:
        ids = load_tokenizer("demo")(evaluation_text().content[:4000]).input_ids
        return [ids[:64], ids[64:128]]

    def _out(self) -> Path:
        source, out = self.source(), self.root / "out"
        out.mkdir()
        for scheme in SCHEMES:
            qkit.convert(source, self.root / f"tiny-{scheme}", format="bnb", scheme=scheme)
        for scheme in SMOL:
            qkit.convert("demo", self.root / f"smol-{scheme}", format="bnb", scheme=scheme)
        job = {
            "folders": {f"smol-{scheme}": str(self.root / f"smol-{scheme}") for scheme in SMOL},
            "tokens": self.tokens(),
            "out": str(out),
            "save": {scheme: [str(source), arguments] for scheme, arguments in SCHEMES.items()},
        }
        print(clients.run("bitsandbytes", job, out))
        return out


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bnb"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_files_as_bitsandbytes(scheme: str, bench: Bench) -> None:
    """Code for code and scale for scale, under the same names: every tensor of the folder."""
    theirs = load_file(bench.out() / scheme / "model.safetensors")
    (file,) = (bench.root / f"tiny-{scheme}").glob("*.safetensors")
    ours = load_file(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        found = ours[name]
        assert found.dtype == tensor.dtype, name
        if ".quant_state." in name:
            a, b = (json.loads(bytes(t.tolist())) for t in (found, tensor))
            assert a.pop("nested_offset", 0) == pytest.approx(b.pop("nested_offset", 0), rel=1e-6)
            assert list(a.items()) == list(b.items())
            continue
        assert found.shape == tensor.shape, name
        if name.endswith("nested_absmax"):  # of scales less an offset that is a mean
            assert torch.allclose(found, tensor, rtol=1e-5)
        elif name.endswith("absmax") and scheme.endswith("dq"):
            # The nearest of 256 values: bitsandbytes' CPU build looks its thresholds up in a table of 2**16 places, so
            # that what lies within 2e-5 of a midpoint may fall to the other side; its CUDA kernel compares.
            differ = (found.int() - tensor.int()).abs()
            assert int(differ.max()) <= 1 and float((differ > 0).double().mean()) < 0.05, name
        else:
            assert torch.equal(found, tensor), name
    configs = []
    for folder in (bench.root / f"tiny-{scheme}", bench.out() / scheme):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert (config.pop("llm_int8_skip_modules") or ["lm_head"]) == ["lm_head"]
        configs.append(config)
    assert configs[0] == configs[1]


@pytest.mark.parametrize("scheme", SMOL)
def test_same_logits_as_qkit(scheme: str, bench: Bench) -> None:
    """LLM.int8() rounds its inputs to 8 bits too, which qkit's own load does not."""
    theirs = torch.from_numpy(np.load(bench.out() / f"smol-{scheme}.npy"))
    tokens = torch.tensor(bench.tokens())
    with torch.inference_mode():
        exact, own = (
            qkit.load(bench.root / f"smol-{scheme}", device="cpu", dtype=dtype)(tokens).logits.float()
            for dtype in ("float32", "bfloat16")
        )
        other = qkit.load(bench.root / f"smol-{'fp4' if scheme != 'fp4' else 'nf4'}", device="cpu")(tokens).logits
    distance, allowed = rmse(theirs, exact), (6 if scheme == "int8" else 2) * rmse(own, exact)
    print(f"{scheme}: {distance:.4f}, allowed {allowed:.4f}")
    assert distance <= allowed
    assert rmse(theirs, other.float()) > allowed  # the bound can fail
