"""Writes profiles/hosted.csv: what providers ask for a million tokens of open models, from the table in litellm.

    pip download --no-deps litellm && python benchmarks/hosted_prices.py litellm-*.whl --date 2026-11-30

--date: when the wheel was fetched. Providers and models: below; one that lists none of a model's names is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import zipfile
from pathlib import Path

# model, model_type, billions of parameters as its config gives them, pattern of its names
MODELS = (
    ("Llama-3.1-8B", "llama", 8.030, r"llama-?3\.1-8b"),
    ("Llama-3.2-3B", "llama", 3.213, r"llama-?3\.2-3b"),
    ("Llama-3.3-70B", "llama", 70.554, r"llama-?3\.3-70b"),
    ("Llama-3.1-405B", "llama", 405.853, r"llama-?3\.1-405b"),
    ("Qwen2.5-7B", "qwen2", 7.616, r"qwen2\.5-7b"),
    ("Qwen2.5-72B", "qwen2", 72.706, r"qwen2\.5-72b"),
    ("Qwen3-8B", "qwen3", 8.191, r"qwen3-8b"),
    ("Qwen3-14B", "qwen3", 14.768, r"qwen3-14b"),
    ("Qwen3-32B", "qwen3", 32.762, r"qwen-?3-32b"),
    ("Qwen3-30B-A3B", "qwen3_moe", 30.532, r"qwen3-30b-a3b"),
    ("Qwen3-235B-A22B", "qwen3_moe", 235.094, r"qwen3-235b-a22b"),
    ("Qwen3-Coder-480B-A35B", "qwen3_moe", 480.155, r"qwen3-coder-480b"),
    ("Qwen3-Next-80B-A3B", "qwen3_next", 79.674, r"qwen3-next-80b"),
    ("Gemma-3-12B", "gemma3_text", 11.766, r"gemma-3-12b"),
    ("Gemma-3-27B", "gemma3_text", 27.009, r"gemma-3-27b"),
    ("Mistral-Nemo-12B", "mistral", 12.248, r"mistral-nemo"),
    ("Mistral-Small-24B", "mistral", 23.572, r"mistral-small-(24b|3\.2)"),
    ("Mixtral-8x7B", "mixtral", 46.703, r"mixtral-8x7b"),
    ("Mixtral-8x22B", "mixtral", 140.630, r"mixtral-8x22b"),
    ("DeepSeek-V3", "deepseek_v3", 671.026, r"deepseek-v3(-0324|p?\.?1|$)"),
    ("gpt-oss-20b", "gpt_oss", 20.915, r"gpt-oss-20b"),
    ("gpt-oss-120b", "gpt_oss", 116.829, r"gpt-oss-120b"),
)  # fmt: skip
PROVIDERS = ("deepinfra", "together_ai", "groq", "fireworks_ai", "novita", "nebius", "cerebras")
OTHERS = re.compile(
    r"nemotron|hermes|distill|vl-|omni|safeguard|dolphin|dobby|cogito|base|bf16|draft|thinking|community"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--date", required=True)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        table = json.loads(wheel.read("litellm/model_prices_and_context_window_backup.json"))
    source = f"litellm {args.wheel.name.split('-')[1]} (PyPI), model_prices_and_context_window"
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["model", "model_type", "parameters_b", "provider", "usd_in", "usd_out", "date", "source"])
    for model, kind, billions, pattern in MODELS:
        found: dict[str, tuple[float, float]] = {}
        for name, entry in table.items():
            provider = entry.get("litellm_provider")
            asked, given = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
            if provider not in PROVIDERS or not asked or not given or entry.get("mode") != "chat":
                continue
            if re.search(pattern, name.lower()) and not OTHERS.search(name.lower()):
                price = round(asked * 1e6, 4), round(given * 1e6, 4)
                found[provider] = min(found.get(provider, price), price, key=sum)  # the cheapest of its variants
        for provider, (usd_in, usd_out) in sorted(found.items()):
            writer.writerow([model, kind, billions, provider, usd_in, usd_out, args.date, source])


if __name__ == "__main__":
    main()
