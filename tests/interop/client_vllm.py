"""Runs inside vLLM's environment (CPU build): see client_transformers.py for the job.

Writes out/<name>.json: for each sequence, for each of its tokens from the second on, [log-probability of that
token, id of the likeliest token]; and out/<name>.kernels.json: {"what computes a layer": how many such layers}; and
out/<name>.cache.json: for each attention [type of its KV cache, scale of keys, scale of values].
Folders named in the job's "compile" go through torch.compile, the others run eagerly; those in "adapters" get that
LoRA adapter. One engine after another in this process.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_layers import cache_scales, layers


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    tokens = job["tokens"]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    for name, folder in job["folders"].items():
        adapter = job.get("adapters", {}).get(name)
        llm = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=len(tokens[0]) + 16,
            max_num_seqs=len(tokens),
            max_num_batched_tokens=256,
            enforce_eager=name not in job.get("compile", ()),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enable_lora=adapter is not None,
        )
        prompts = [{"prompt_token_ids": row} for row in tokens]
        if adapter is None:
            results = llm.generate(prompts, params, use_tqdm=False)
        else:
            # One at a time: vLLM 0.32 takes the wrong rows for log-probabilities of two adapted prompts in one step.
            request = LoRARequest(name, 1, adapter)
            results = [llm.generate([p], params, use_tqdm=False, lora_request=request)[0] for p in prompts]
        rows = []
        for row, result in zip(tokens, results, strict=True):
            entries = zip(row[1:], result.prompt_logprobs[1:], strict=True)
            rows.append([[e[t].logprob, max(e, key=lambda i: e[i].logprob)] for t, e in entries])
        (Path(job["out"]) / f"{name}.json").write_text(json.dumps(rows))
        (kinds,) = llm.apply_model(layers)
        (Path(job["out"]) / f"{name}.kernels.json").write_text(json.dumps(kinds))
        (caches,) = llm.apply_model(cache_scales)
        (Path(job["out"]) / f"{name}.cache.json").write_text(json.dumps(caches))
        print(name, len(rows), kinds, flush=True)
        del llm
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
