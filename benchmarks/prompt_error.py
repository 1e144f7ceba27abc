"""How far a prompt's logits are from float32: the C++ path beside the model's own forward in bfloat16, on one folder.

For each length, windows of the shipped evaluation text; KL divergence of the next token's distribution from the same
packed model's in float32, mean and largest of the windows. The last line of stdout is one JSON document.

    python benchmarks/prompt_error.py FOLDER [FOLDER ...] [--lengths 16 128 512] [--windows 16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import qkit
from qkit.runtime import decoder
from qkit.text.defaults import evaluation_text
from qkit.text.tokenizer import load_tokenizer


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)  # type: ignore[no-any-return]


def measure(folder: str, lengths: list[int], windows: int) -> list[dict[str, Any]]:
    fast, exact = qkit.load(folder, "cpu"), qkit.load(folder, "cpu", dtype="float32")
    text = torch.tensor(load_tokenizer(folder)(evaluation_text().content)["input_ids"])
    rows = []
    for length in lengths:
        found: dict[str, list[float]] = {"own forward": [], "C++": []}
        for ids in text.split(length)[:windows]:
            truth = logits(exact, ids[None])
            for name, attached in (("own forward", False), ("C++", True)):
                decoder.detach(fast)
                if attached and (reason := decoder.attach(fast)) is not None:
                    raise SystemExit(f"{folder}: {reason}")
                other = logits(fast, ids[None])
                found[name].append(float((truth.exp() * (truth - other)).sum()))
        for name, values in found.items():
            row = {"model": Path(folder).name, "tokens": length, "forward": name, "windows": len(values),
                   "mean_kl": sum(values) / len(values), "most_kl": max(values)}  # fmt: skip
            rows.append(row)
            print(f"{row['model']}, {length} tokens, {name}: KL {row['mean_kl']:.2e}, at most {row['most_kl']:.2e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    print(json.dumps([row for folder in args.folders for row in measure(folder, args.lengths, args.windows)]))


if __name__ == "__main__":
    main()
