"""Runs inside llama.cpp's environment: the KV caches that it makes for a model, as its log says.

Usage: client_llamacpp_cache.py JOB.json, {"model": file, "settings": [[tokens, sequences, ubatch, ggml type], ...],
"out": file}. Writes to `out` a list of [MiB, ...], one for each cache of each setting.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import llama_cpp

SIZE = re.compile(r"llama_kv_cache: size = +([0-9.]+) MiB")
WORDS: list[str] = []


@llama_cpp.llama_log_callback
def keep(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    WORDS.append(text.decode("utf-8", "replace"))


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
    found = []
    for tokens, sequences, ubatch, kind in job["settings"]:
        WORDS.clear()
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.kv_unified = tokens * sequences, sequences, False
        wanted.n_ubatch, wanted.n_batch, wanted.swa_full = ubatch, max(512, ubatch), False
        wanted.type_k = wanted.type_v = kind
        wanted.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(model, wanted)
        found.append([float(size) for size in SIZE.findall("".join(WORDS))])
        llama_cpp.llama_free(context)
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
