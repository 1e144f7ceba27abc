"""Quantize with AutoRound, by its own documentation, for the README's table. Runs in its own environment.

python autoround_quantize.py SOURCE OUT --calib FILE --iters 0|50 [--samples 64] [--length 512]
"""

import argparse
import json
import resource
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--calib", required=True)
parser.add_argument("--iters", type=int, default=0)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--group-size", type=int, default=128)
args = parser.parse_args()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(args.source)
model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.bfloat16)
ids = tokenizer(Path(args.calib).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
data = [torch.tensor([ids[i * args.length : (i + 1) * args.length]]) for i in range(args.samples)]
rounder = AutoRound(
    model,
    tokenizer,
    bits=4,
    group_size=args.group_size,
    sym=True,
    iters=args.iters,
    nsamples=args.samples,
    seqlen=args.length,
    dataset=data,
    batch_size=8,
)
started = time.perf_counter()
rounder.quantize()
seconds = time.perf_counter() - started
rounder.save_quantized(args.out, format="auto_gptq")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
