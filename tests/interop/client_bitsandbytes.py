"""Runs inside an environment with transformers and bitsandbytes, on the CPU.

Usage: client_bitsandbytes.py JOB.json, where the job is {"folders": {name: path}, "tokens": [[...]], "out": dir,
"save": {name: [source, {arguments of BitsAndBytesConfig}]}}. Writes out/<name>.npy: float32 logits [batch, tokens,
vocabulary] of each folder; and out/<name>: what bitsandbytes and `save_pretrained` make of a source. Knows nothing of
qkit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    out = Path(job["out"])
    for name, (source, arguments) in job.get("save", {}).items():
        config = BitsAndBytesConfig(**arguments)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(out / name)
    tokens = torch.tensor(job["tokens"])
    for name, folder in job["folders"].items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
        kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
        with torch.inference_mode():
            logits = model(tokens).logits.float().numpy()
        np.save(out / f"{name}.npy", logits)
        print(name, logits.shape, *kinds, flush=True)
        del model


if __name__ == "__main__":
    main(sys.argv[1])
