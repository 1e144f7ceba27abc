"""Quantize with llama.cpp (through llama-cpp-python) for the README's table. Runs in its own environment.

python llamacpp_quantize.py SOURCE.gguf OUT.gguf --type Q4_0
"""

import argparse
import ctypes
import json
import resource
import time

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q4_K_M", "Q8_0"])
args = parser.parse_args()

import llama_cpp  # noqa: E402

params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{args.type}")
params.allow_requantize = True
params.nthread = 2
started = time.perf_counter()
code = llama_cpp.llama_model_quantize(args.source.encode(), args.out.encode(), ctypes.byref(params))
seconds = time.perf_counter() - started
if code:
    raise SystemExit(f"llama_model_quantize returned {code}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
