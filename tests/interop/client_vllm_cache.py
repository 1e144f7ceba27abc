"""Runs inside vLLM's environment (CPU build): what vLLM itself counts for the KV cache of one request.

Usage: client_vllm_cache.py JOB.json, {"folders": {name: path}, "tokens": [n, ...], "out": dir}. Of each folder its
config.json is read, and random weights are made. Writes out/cache.json: name -> {"in_flight": tokens that a
step may schedule, "recurrent_dtype": of a recurrence's states, "bytes": {tokens: bytes}}.
"""

import json
import sys
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class Runner(GPUModelRunner):
    """Only what asks the layers."""

    def __init__(self, config):
        self.vllm_config = config
        self.shared_kv_cache_layers = {}


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    torch.accelerator.empty_cache = lambda: None  # asks for a GPU's
    out, found, ready = Path(job["out"]), {}, False
    for name, folder in job["folders"].items():
        arguments = EngineArgs(
            folder, dtype="bfloat16", max_model_len=max(job["tokens"]), enforce_eager=True, skip_tokenizer_init=True,
            load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=8,
            async_scheduling=False,
        )  # fmt: skip
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not ready:
                init_distributed_environment(1, 0, f"file://{out}/rendezvous", 0, "gloo")
                ready = True
            destroy_model_parallel()  # its groups depend on the model
            initialize_model_parallel(1, 1)
            get_model(vllm_config=config)
            current_platform.update_block_size_for_backend(config)
            config.cache_config.kv_cache_layout = "LBHNC"  # which the engine settles later
            specs = Runner(config).get_kv_cache_spec()
            counted = {}
            for tokens in job["tokens"]:
                config.model_config.max_model_len = tokens
                groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
                counted[tokens] = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        found[name] = {
            "in_flight": config.max_in_flight_tokens,
            "recurrent_dtype": config.cache_config.mamba_ssm_cache_dtype, "bytes": counted,
        }  # fmt: skip
        print(name, found[name], flush=True)
    (out / "cache.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
