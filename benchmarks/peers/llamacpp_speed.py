"""Prefill and decode speed of a GGUF in llama.cpp (through llama-cpp-python). Runs in its own environment.

python llamacpp_speed.py MODEL.gguf [--prompt 512] [--tokens 64] [--repeats 3]
"""

import argparse
import json
import statistics
import time

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--repeats", type=int, default=3)
args = parser.parse_args()

from llama_cpp import Llama  # noqa: E402

context = args.prompt + args.tokens + 8
model = Llama(args.model, n_ctx=context, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False)
prompt = [1 + i % 1000 for i in range(args.prompt)]
prefill, decode = [], []
for repeat in range(args.repeats + 1):  # the first one warms up
    model.reset()
    started = time.perf_counter()
    model.eval(prompt)
    first = time.perf_counter()
    token = 5
    for _ in range(args.tokens):
        model.eval([token])
    done = time.perf_counter()
    if repeat:
        prefill.append(args.prompt / (first - started))
        decode.append(args.tokens / (done - first))
print(
    json.dumps({"prefill_tokens_per_s": statistics.median(prefill), "decode_tokens_per_s": statistics.median(decode)})
)
