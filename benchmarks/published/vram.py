"""Published peaks of torch's allocator beside what `qkit.estimate` says of weights, KV cache and activations."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from qkit.estimate.memory import memory
from qkit.estimate.weights import of_architecture
from qkit.hardware.device import Device, Target

from .rows import _architecture

_GPU = Device("gpu", "GPU", "", "", "gpu", (), 80.0, 80.0, None)

# A published format -> (format, scheme) of the same bytes. GPTQ's, AWQ's and FP8's linears, 16 bits for the rest.
_FORMATS = (
    (r"gptq-int4", ("gptq", "w4a16")),
    (r"gptq-int8", ("gptq", "w8a16")),
    (r"awq", ("awq", "w4a16-asym")),
    (r"fp8", ("compressed-tensors", "fp8-block")),
    (r"bf16|fp16", ("safetensors", None)),
)


@dataclass(frozen=True)
class Peak:
    """GiB over all devices."""

    engine: str
    words: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def compare(path: Path) -> list[Peak]:
    """Rows with vram_gib, of formats and models that are known here."""
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind = next((k for pattern, k in _FORMATS if re.search(pattern, row["format"], re.IGNORECASE)), None)
            if not row.get("vram_gib") or kind is None or not row["prompt_len"].isdigit():
                continue
            found.append(_peak(row, *kind))
    return found


def _peak(row: dict[str, str], format: str, scheme: str | None) -> Peak:
    arch, _ = _architecture(row["model"], float(row["params_b"]))
    generated = int(row["gen_len_or_ctx"]) if row["gen_len_or_ctx"].isdigit() else 0
    prompt, batch = int(row["prompt_len"]), int(row["batch"])
    weights = of_architecture(arch, scheme, format)

    # While the prompt passes, its activations; at the end, the cache of all tokens: the larger counts.
    def total(tokens: int, passing: int) -> int:
        kept = memory(arch, weights, Target(_GPU), "transformers", tokens, batch)
        step = memory(arch, weights, Target(_GPU), "transformers", passing, batch)
        return kept.of("weights") + kept.of("KV cache") + step.of("activations") + step.of("logits")

    peak = max(total(prompt, prompt), total(prompt + generated, 1))
    words = f"{row['model']} {row['format']}, {row['engine']}, batch {batch}, {prompt} + {generated} tokens"
    return Peak(row["engine"], words, float(row["vram_gib"]), peak / (1 << 30))
