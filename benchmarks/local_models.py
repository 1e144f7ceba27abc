"""The models of which speed and memory are measured on a CPU, each in the formats of its engines.

Two that packages ship (SmolLM2-135M: `demo`; Gemma-3-270M: a file), and made ones: speed hangs on shapes, not on
values. Their names and configs are in published/models.json.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from byte_tokenizer import write_tokenizer
from published.rows import entries

FORMATS = {  # row -> (engine, folder, options of `qkit convert` from the bf16 folder)
    "W4A16": ("qkit", "w4a16", ("--scheme", "w4a16")),
    "W8A16": ("qkit", "w8a16", ("--scheme", "w8a16")),
    "BF16": ("qkit", "bf16", ()),
    "GGUF Q4_K_M": ("llama.cpp", "q4_k_m", ("--format", "gguf", "--scheme", "q4_k_m")),
    "GGUF Q8_0": ("llama.cpp", "q8_0", ("--format", "gguf", "--scheme", "q8_0")),
    "GGUF BF16": ("llama.cpp", "gguf-bf16", ("--format", "gguf", "--scheme", "none")),
    "BF16, own forward": ("transformers", "bf16", ()),
}
SHIPPED = {"SmolLM2-135M": "demo", "Gemma-3-270M": "gemma"}


@dataclass(frozen=True)
class Candidate:
    """A model in one format: `path` is what its engine opens."""

    model: str
    format: str
    engine: str
    path: Path


def names() -> list[str]:
    return [*SHIPPED, *(entry["names"][0] for entry in entries() if entry.get("made"))]


def candidates(work: Path, models: Sequence[str], formats: Sequence[str]) -> list[Candidate]:
    """Those that `prepare` made in `work`."""
    found = []
    for model in models:
        for name in formats:
            engine, folder, _ = FORMATS[name]
            path = work / _slug(model) / folder
            if engine == "llama.cpp":
                path = next(path.glob("*.gguf"))
            found.append(Candidate(model, name, engine, path))
    return found


def prepare(work: Path, models: Sequence[str], formats: Sequence[str], gemma: Path | None) -> None:
    """Makes what is not there yet, by rounding to the nearest: values do not matter."""
    for model in models:
        base = work / _slug(model) / "bf16"
        if not base.exists():
            if model in SHIPPED:
                source = SHIPPED[model] if model != "Gemma-3-270M" else str(gemma)
                convert(source, base, "--format", "safetensors", "--scheme", "none")
            else:
                _made(base, next(e["config"] for e in entries() if model in e["names"]))
        for name in formats:
            _, folder, options = FORMATS[name]
            if options and not (base.parent / folder).exists():
                rounding = () if options[-1] == "none" else ("--method", "rtn")
                convert(str(base), base.parent / folder, *options, *rounding)


def _slug(model: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in model.lower())


def convert(source: str, out: Path, *options: str) -> None:
    """`qkit convert`, in a process of its own."""
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "qkit", "convert", source, "-o", str(out), "--json", *options],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def _made(base: Path, config: dict[str, int]) -> None:
    """A folder in bfloat16 by random_llama.py, with a tokenizer of bytes, without which no GGUF file is written."""
    shape = {
        "--layers": "num_hidden_layers", "--hidden": "hidden_size", "--intermediate": "intermediate_size",
        "--heads": "num_attention_heads", "--kv-heads": "num_key_value_heads", "--vocab": "vocab_size",
    }  # fmt: skip
    options = [text for option, key in shape.items() for text in (option, str(config[key]))]
    script = str(Path(__file__).parent / "random_llama.py")
    subprocess.run([sys.executable, script, str(base.parent), *options, "--only", "bf16"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    write_tokenizer(base)
