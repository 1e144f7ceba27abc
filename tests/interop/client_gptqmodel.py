"""Runs inside gptqmodel's environment and loads with its own loader: see client_transformers.py for the job."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    tokens = torch.tensor(job["tokens"])
    for name, folder in job["folders"].items():
        method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
        # Its plain torch kernels: the others are built for a GPU or compile C++ at first use.
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
        loaded = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.bfloat16)
        kinds = sorted({type(m).__name__ for m in loaded.model.modules() if "Linear" in type(m).__name__})
        with torch.inference_mode():
            logits = loaded.model(tokens).logits.float().numpy()
        np.save(Path(job["out"]) / f"{name}.npy", logits)
        print(name, logits.shape, *kinds, flush=True)
        del loaded


if __name__ == "__main__":
    main(sys.argv[1])
