"""Runs inside an environment with auto-gptq and autoawq, on the CPU, and loads with their own loaders.

Usage: client_discontinued.py JOB.json, where the job is {"folders": {name: path}, "tokens": [[...]], "out": dir}.
Writes out/<name>.npy: float32 logits [batch, tokens, vocabulary]; and out/<name>.safetensors: of each quantized linear,
what its forward makes of the unit matrix, which is its weight [inputs, outputs] plus a bias. Knows nothing of qkit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def gptq(folder: str) -> tuple[torch.nn.Module, type]:
    from auto_gptq import AutoGPTQForCausalLM
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear  # what it takes where nothing is reordered

    return AutoGPTQForCausalLM.from_quantized(folder, device="cpu").model, QuantLinear


def awq(folder: str) -> tuple[torch.nn.Module, type]:
    """The steps of `from_quantized`, which without a GPU insists on Intel's extension of PyTorch (2.8 is its last).
    WQLinear_GEMM needs neither: where Triton is not installed it computes by autoawq's `dequantize_gemm`."""
    from accelerate import load_checkpoint_and_dispatch
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from awq.modules.linear.gemm import WQLinear_GEMM
    from transformers import AutoConfig, AutoModelForCausalLM

    own = AWQ_CAUSAL_LM_MODEL_MAP[AutoConfig.from_pretrained(folder).model_type]
    _, config, settings = own._load_config(own, folder, "")
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    own._load_quantized_modules(own, model, settings, settings.version, use_exllama=False, use_exllama_v2=False)
    load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"}, dtype=torch.float16)
    return model.eval(), WQLinear_GEMM


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    out = Path(job["out"])
    for name, folder in job["folders"].items():
        method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
        model, kind = {"gptq": gptq, "awq": awq}[method](folder)
        layers = {module: layer for module, layer in model.named_modules() if isinstance(layer, kind)}
        with torch.inference_mode():
            # A row of the unit matrix picks a row of the weight: one product and zeros, so nothing is rounded.
            made = {m: layer(torch.eye(inputs(layer), dtype=torch.float16)) for m, layer in layers.items()}
            logits = model(torch.tensor(job["tokens"])).logits.float().numpy()
        save_file(made, out / f"{name}.safetensors")
        np.save(out / f"{name}.npy", logits)
        print(name, logits.shape, len(made), kind.__name__, flush=True)


def inputs(layer: torch.nn.Module) -> int:
    return layer.infeatures if hasattr(layer, "infeatures") else layer.in_features


if __name__ == "__main__":
    main(sys.argv[1])
