"""Runs inside vLLM's environment (CPU build): the experts of quantized mixtures as vLLM's own loader and its own
dequantization have them.

vLLM has no CPU kernel for packed experts. Its loader, which fuses them, and its "emulation" backend, which dequantizes
them as it loads, need no GPU: that backend is chosen here whatever the platform says, and no kernel is made.

Usage: client_vllm_experts.py JOB.json, {"folders": {name: path}, "out": dir}. Writes out/<name>.safetensors: for each
layer "<layer>.w13" [experts, gate and up, in] and "<layer>.w2" [experts, out, in], bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)
from vllm.model_executor.model_loader import get_model


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    wna16.select_wna16_moe_backend = lambda **_: (WNA16MoEBackend.EMULATION, Int4EmulationTritonExperts)
    wna16.make_wna16_moe_kernel = lambda **_: None
    torch.accelerator.empty_cache = lambda: None  # asks for a GPU's
    out, ready = Path(job["out"]), False
    for name, folder in job["folders"].items():
        arguments = EngineArgs(folder, dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not ready:
                init_distributed_environment(1, 0, f"file://{out}/rendezvous", 0, "gloo")
                initialize_model_parallel(1, 1)
                ready = True
            parameters = dict(get_model(vllm_config=config).named_parameters())
        found = {}
        for key, value in parameters.items():
            layer, _, local = key.partition(".routed_experts.")
            if local in ("w13_weight_packed", "w2_weight_packed"):  # which hold values by now
                found[f"{layer}.{local.partition('_')[0]}"] = value.detach().contiguous()
            config.compilation_config.static_forward_context.clear()
        save_file(found, out / f"{name}.safetensors")
        print(name, sorted(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
