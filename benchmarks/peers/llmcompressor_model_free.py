"""Round to W4A16 with llm-compressor's model-free path. Runs in its own environment.

python llmcompressor_model_free.py SOURCE OUT [--workers N]
"""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--workers", type=int, default=1)
args = parser.parse_args()

from llmcompressor import model_free_ptq  # noqa: E402

model_free_ptq(
    model_stub=args.source,
    save_directory=args.out,
    scheme="W4A16",
    ignore=["lm_head", "model.embed_tokens"],
    max_workers=args.workers,
    device="cpu",
)
