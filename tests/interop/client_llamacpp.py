"""Runs inside llama-cpp-python's own environment.

Usage: client_llamacpp.py JOB.json, where the job is {"folders": {name: path}, "tokens": [[...]], "out": dir, "texts":
[...]}; a path is a folder with one .gguf file, or the file. Writes out/<name>.npy: float32 logits [batch, tokens,
vocabulary], and out/<name>.tokens.json: what llama.cpp makes of each text, {"plain": [...], "special": [...]} (the
latter as the model wants it: BOS added, and special tokens in the text taken as such). "quantize" lists files that
llama.cpp's own quantizer makes of others: [source, out, file type]. Knows nothing of qkit.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama


def quantize(source: str, out: str, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize refused {source}")


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    for source, out, file_type in job.get("quantize", ()):
        quantize(source, out, file_type)
    for name, place in job["folders"].items():
        path = Path(place)
        file = path if path.is_file() else next(path.glob("*.gguf"))
        length = max(len(row) for row in job["tokens"])
        model = Llama(str(file), n_ctx=length, n_batch=length, n_threads=2, logits_all=True, verbose=False)
        rows = []
        for row in job["tokens"]:
            model.reset()
            model.eval(row)
            rows.append(np.array(model.scores[: len(row)], dtype=np.float32))
        np.save(Path(job["out"]) / f"{name}.npy", np.stack(rows))
        made = [
            {
                "plain": model.tokenize(text.encode(), add_bos=False, special=False),
                "special": model.tokenize(text.encode(), add_bos=True, special=True),
            }
            for text in job.get("texts", ())
        ]
        (Path(job["out"]) / f"{name}.tokens.json").write_text(json.dumps(made))
        print(name, rows[0].shape, flush=True)
        del model


if __name__ == "__main__":
    main(sys.argv[1])
