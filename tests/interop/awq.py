"""A folder as AutoAWQ writes them (version "gemm"), made from one of ours: qkit itself does not write the format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qkit import kernels

# AutoAWQ, awq/modules/linear/gemm.py: output 8j + _ORDER[i] is nibble i of word j.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, out] -> int32 [rows, out / 8]."""
    ordered = codes.view(codes.shape[0], -1, 8)[:, :, _ORDER]
    return kernels.pack(ordered.reshape(codes.shape).contiguous(), 4)


def write(source: Path, out: Path) -> Path:
    """The compressed-tensors folder `source` (4 bits, asymmetric) as an AWQ folder `out` with the same values."""
    config = json.loads((source / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    stored = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    tensors = {}
    for name, tensor in stored.items():
        module, _, local = name.rpartition(".")
        if local == "weight_packed":
            rows, columns = stored[f"{module}.weight_shape"].tolist()
            zero = kernels.unpack(stored[f"{module}.weight_zero_point"].t().contiguous(), 4, rows)
            tensors[f"{module}.qweight"] = _words(kernels.unpack(tensor, 4, columns).t().contiguous())
            tensors[f"{module}.qzeros"] = _words(zero)
            tensors[f"{module}.scales"] = stored[f"{module}.weight_scale"].t().contiguous().to(torch.float16)
        elif not local.startswith("weight_"):
            tensors[name] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weights["group_size"],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
