"""Runs inside a client's own environment: plain transformers (with compressed-tensors, or optimum + gptqmodel).

Usage: client_transformers.py JOB.json, where the job is {"folders": {name: path}, "tokens": [[...]], "out": dir,
"dequantize": [name, ...], "float32": [name, ...]}: folders in "dequantize" are loaded with
CompressedTensorsConfig(dequantize=True), those in "float32" in that type, the others in bfloat16.
Writes out/<name>.npy: float32 logits [batch, tokens, vocabulary]; where the KV cache is rounded also
out/<name>.cache.npz: keys and values of the first layer [batch, heads, tokens, head_dim], and the scales of all layers
[layers, 2]. Knows nothing of qkit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def _options(folder: str, dequantize: bool) -> dict:
    if dequantize:
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    given = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    if given["quant_method"] == "gptq":
        from transformers import GPTQConfig

        # Only the backend is taken from here. Its torch kernel: others compile C++ at first use.
        return {"quantization_config": GPTQConfig(bits=given["bits"], backend="gptq_torch")}
    if given["quant_method"] == "awq":
        from transformers import AwqConfig

        return {"quantization_config": AwqConfig(bits=4, backend="torch_awq")}
    return {}


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    tokens = torch.tensor(job["tokens"])
    for name, folder in job["folders"].items():
        options = _options(folder, name in job.get("dequantize", ()))
        dtype = torch.float32 if name in job.get("float32", ()) else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
        with torch.inference_mode():
            output = model(tokens, use_cache=True)
        logits = output.logits.float().numpy()
        np.save(Path(job["out"]) / f"{name}.npy", logits)
        scales = [[float(m.k_scale), float(m.v_scale)] for m in model.modules() if hasattr(m, "k_scale")]
        if scales:
            first = output.past_key_values.layers[0]
            cache = {"keys": first.keys.float().numpy(), "values": first.values.float().numpy(), "scales": scales}
            np.savez(Path(job["out"]) / f"{name}.cache.npz", **cache)
        print(name, logits.shape, *kinds, flush=True)
        del model


if __name__ == "__main__":
    main(sys.argv[1])
