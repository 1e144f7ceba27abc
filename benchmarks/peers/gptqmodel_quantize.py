"""Quantize with GPTQModel, by its own documentation, for the README's table. Runs in its own environment.

GPTQMODEL_CPU_WORKERS=2 python gptqmodel_quantize.py SOURCE OUT --calib FILE [--samples 64] [--length 512]
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
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--group-size", type=int, default=128)
args = parser.parse_args()

from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(args.source)
ids = tokenizer(Path(args.calib).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
data = [
    {"input_ids": ids[i * args.length : (i + 1) * args.length], "attention_mask": [1] * args.length}
    for i in range(args.samples)
]
model = GPTQModel.load(args.source, QuantizeConfig(bits=4, group_size=args.group_size), device="cpu")
started = time.perf_counter()
model.quantize(data, batch_size=1)
seconds = time.perf_counter() - started
model.save(args.out)
tokenizer.save_pretrained(args.out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
