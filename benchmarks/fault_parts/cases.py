"""What is converted while things go wrong: tiny checkpoints, every format that is written, every method it takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

CALIBRATED = ("--calib-samples", "4", "--calib-len", "32")
# Three decoder blocks; a head of its own, a tied one, experts, experts in one tensor.
MODELS = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "tied": ("qwen3", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "moe": ("mixtral", {"num_hidden_layers": 2}),
    "fused": ("gpt_oss", {"num_hidden_layers": 2}),
}


@dataclass(frozen=True)
class Case:
    """A conversion. replaces: over an earlier one at the same place, with --restart."""

    name: str
    model: str
    options: tuple[str, ...]
    replaces: bool = False


def modules() -> list[str]:
    """Those of transformers that define the models."""
    return [f"transformers.models.{family}.modeling_{family}" for family, _ in MODELS.values()]


def make_model_folder(name: str, folder: Path) -> None:
    """One of MODELS, with files beside the weights as a chat model has them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from models import make_model

    family, changes = MODELS[name]
    make_model(folder, family, **changes)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}" * 50)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("licence\n" * 100)


def small_files() -> None:
    """Shards and slabs of a size that tiny models have several of."""
    from qkit.conversion import plan, tasks

    plan.SHARD_BYTES = 150_000
    tasks.SLAB_BYTES = 20_000


def all_cases() -> list[Case]:
    """One for every format and method that go together, with the models in turns; then what has steps of its own."""
    from qkit.formats import FORMATS
    from qkit.methods import METHODS
    from qkit.spec import PRESETS

    found: list[Case] = []
    for name, fmt in FORMATS.items():
        if fmt.read_only:
            continue
        spec = PRESETS.get(fmt.default_scheme)
        for method, own in METHODS.items():
            able = own.check(spec) is None if spec is not None else method == "rtn"
            if able:
                model = "fused" if name == "mxfp4" else ("llama", "tied", "moe")[len(found) % 3]
                calibrated = CALIBRATED if own.needs else ()
                found.append(Case(f"{name} {method}", model, ("--format", name, "--method", method, *calibrated)))
    cache = ("--kv-cache", "fp8", *CALIBRATED)
    return [
        *found,
        Case("compressed-tensors rtn, KV cache", "tied", ("--method", "rtn", *cache)),
        Case("compressed-tensors gptq, MoE", "moe", ("--method", "gptq", *CALIBRATED)),
        Case("compressed-tensors rtn, 4-bit head", "llama", ("--method", "rtn", "--head", "4bit")),
        Case("compressed-tensors rtn, replacing", "llama", ("--method", "rtn", "--restart"), replaces=True),
        Case("gguf rtn, replacing", "moe", ("--format", "gguf", "--method", "rtn", "--restart"), replaces=True),
    ]
