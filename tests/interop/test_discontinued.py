"""Our GPTQ and AWQ folders in auto-gptq and autoawq, which nobody maintains and many still run: the weight of every
linear as their own torch modules compute it, and one model's logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from interop import clients
from interop.test_clients import rmse
from models import make_model
from safetensors.torch import load_file, save_file

import qkit
from qkit import formats
from qkit.kernels.codes import values_of
from qkit.sources import open_source

TOKENS = [list(range(row * 100, row * 100 + 96)) for row in (0, 1)]
# package -> (format, scheme, group size); 0 is one scale per output channel
FOLDERS = {
    "auto-gptq": (
        ("gptq", "w4a16", 128), ("gptq", "w4a16", 32), ("gptq", "w4a16", 0), ("gptq", "w4a16-asym", 128),
        ("gptq", "w4a16-asym", 32), ("gptq", "w4a16-asym", 0), ("gptq", "w8a16", 128), ("gptq", "w8a16-asym", 0),
        ("gptq", "w3a16", 32), ("gptq", "w3a16-asym", 128), ("gptq", "w2a16", 32), ("gptq", "w2a16-asym", 64),
    ),
    "autoawq": (
        ("awq", "w4a16-asym", 32), ("awq", "w4a16-asym", 64), ("awq", "w4a16-asym", 128), ("awq", "w4a16-asym", 0),
        ("awq", "w4a16", 128),
    ),
}  # fmt: skip
CASES = [(package, *folder) for package, folders in FOLDERS.items() for folder in folders]
# Zero points as they are, which auto-gptq takes for v1's and so reads as one more.
WRONG = ("gptq_v2", "w4a16-asym", 32)


def logits(folder: Path, dtype: str) -> torch.Tensor:
    with torch.inference_mode():
        return qkit.load(folder, device="cpu", dtype=dtype)(torch.tensor(TOKENS)).logits.float()


def name_of(fmt: str, scheme: str, size: int) -> str:
    return f"{fmt}-{scheme}-{size or 'channel'}"


class Bench:
    def __init__(self, root: Path):
        self.root = root
        self.source = cache(self._source)
        self.out = clients.once(self._out)

    def _source(self) -> Path:
        """A model with biases, and with rows of one sign, whose zero points are the least and the greatest."""
        source = make_model(self.root / "source", "qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
        tensors = load_file(source / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensor[1] = 0
                tensor[2] = tensor[2].abs()
                tensor[3] = -tensor[3].abs()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        return source

    def _out(self, package: str) -> Path:
        folders = {}
        for fmt, scheme, size in (*FOLDERS[package], *((WRONG,) if package == "auto-gptq" else ())):
            folder = self.root / name_of(fmt, scheme, size)
            qkit.convert(self.source(), folder, format=fmt, scheme=scheme, group_size=size, method="rtn")
            folders[folder.name] = str(folder)
        out = self.root / package
        out.mkdir()
        print(clients.run("discontinued", {"folders": folders, "tokens": TOKENS, "out": str(out)}, out))
        return out

    def decoded(self, name: str) -> dict[str, torch.Tensor]:
        """Module -> [inputs, outputs] as float16: its weight, plus its bias, by qkit."""
        source = open_source(str(self.root / name))
        reader = formats.reader(json.loads((self.root / name / "config.json").read_text()))
        found = {}
        for module, spec in formats.quantized_modules(reader, source).items():
            found[module] = values_of(formats.read_weight(reader, source, module, spec), torch.float16).t()
            if f"{module}.bias" in source.names():
                found[module] = found[module] + source.read(f"{module}.bias").half()
        return found


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("discontinued"))


@pytest.mark.parametrize(("package", "fmt", "scheme", "size"), CASES)
def test_every_weight(package: str, fmt: str, scheme: str, size: int, bench: Bench) -> None:
    """They multiply integers by scales in float16, which rounds once as qkit does: bit for bit."""
    name = name_of(fmt, scheme, size)
    theirs = load_file(bench.out(package) / f"{name}.safetensors")
    ours = bench.decoded(name)
    assert theirs.keys() == ours.keys() and len(ours) == 7
    for module, values in ours.items():
        assert theirs[module].dtype == torch.float16
        assert torch.equal(theirs[module], values), module


@pytest.mark.parametrize("package", FOLDERS)
def test_same_logits_as_qkit(package: str, bench: Bench) -> None:
    """Of one folder: what is not quantized is the same in all. They compute in float16."""
    name = name_of(*FOLDERS[package][0])
    made = torch.from_numpy(np.load(bench.out(package) / f"{name}.npy"))
    exact, own = (logits(bench.root / name, dtype) for dtype in ("float32", "bfloat16"))
    distance, allowed, far = rmse(made, exact), rmse(own, exact), rmse(made, logits(bench.source(), "float32"))
    print(f"{name}: {distance:.5f}, bfloat16 {allowed:.5f}, unquantized {far:.5f}")
    assert distance <= allowed < far  # the bound can fail


def test_auto_gptq_reads_zero_points_of_v1_alone(bench: Bench) -> None:
    """And says nothing where a folder is of v2."""
    name = name_of(*WRONG)
    theirs = load_file(bench.out("auto-gptq") / f"{name}.safetensors")
    for module, values in bench.decoded(name).items():
        assert float((theirs[module] != values).double().mean()) > 0.9, module
