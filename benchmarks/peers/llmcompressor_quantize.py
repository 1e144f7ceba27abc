"""Quantize with llm-compressor, by its own documentation, for the README's table. Runs in its own environment.

python llmcompressor_quantize.py SOURCE OUT --method rtn|gptq --calib FILE [--samples 64] [--length 512]
"""

import argparse
import json
import resource
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--method", choices=["rtn", "gptq"], required=True)
parser.add_argument("--calib", required=True)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--group-size", type=int, default=128)
args = parser.parse_args()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.source)
ids = tokenizer(Path(args.calib).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
windows = [ids[i * args.length : (i + 1) * args.length] for i in range(args.samples)]
data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * args.length] * args.samples})
groups = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": args.group_size,
        },
    }
}
kind = QuantizationModifier if args.method == "rtn" else GPTQModifier
started = time.perf_counter()
recipe = kind(config_groups=groups, ignore=["lm_head"])
if args.method == "rtn":
    oneshot(model=model, recipe=recipe)
else:
    oneshot(
        model=model,
        recipe=recipe,
        dataset=data,
        max_seq_length=args.length,
        num_calibration_samples=args.samples,
    )
seconds = time.perf_counter() - started
model.save_pretrained(args.out, save_compressed=True)
tokenizer.save_pretrained(args.out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
