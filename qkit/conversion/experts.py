"""Experts that the source has in one tensor: one matrix each where they are quantized, as they were where not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..models.client_names import merges_experts
from ..models.config import text_config
from ..sources.sliced import Joined
from ..spec import Keep, LayerSpec

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.sliced import Sliced
    from ..sources.types import Source

_ONE = re.compile(r"(.*\.experts)\.\d+\.")


def join_kept(
    view: Source, slices: Sliced, choices: Mapping[str, LayerSpec | Keep]
) -> tuple[Source, Mapping[str, LayerSpec | Keep]]:
    """The view with the experts of those blocks in one tensor again of which nothing is quantized: that is how clients
    load them at 16 bits."""
    stems = {fused.stem for fused in slices.fused.values()}
    quantized = {stem for name, choice in choices.items() if isinstance(choice, LayerSpec) and (stem := _stem(name))}
    kept = stems - quantized
    if not kept:
        return view, choices
    reasons = {stem: c for name, c in choices.items() if isinstance(c, Keep) and (stem := _stem(name)) in kept}
    joined = Joined(view, slices, kept)
    return joined, {n: reasons[joined.joined[n].stem] if n in joined.joined else choices[n] for n in joined.names()}


def notes_of(
    slices: Sliced, choices: Mapping[str, LayerSpec | Keep], fmt: Format, config: Mapping[str, Any]
) -> list[str]:
    """What to say of experts that are written one matrix each."""
    made = [n for n, c in choices.items() if isinstance(c, LayerSpec) and _stem(n)]
    if not made or fmt.container == "gguf" or fmt.whole_experts:
        return []
    notes = [f"{len(made)} matrices of experts, {len(slices.fused)} tensors in the source, are stored one by one"]
    kind = text_config(config).get("model_type")
    if kind == "gpt_oss":
        notes.append(
            "WARNING: transformers by itself and vLLM load gpt-oss' experts as --format mxfp4 stores them, not so; "
            "qkit.load, and transformers after `import qkit`, do"
        )
    elif not merges_experts(config):
        notes.append(
            f"WARNING: vLLM loads {kind}'s experts so, transformers by itself does not: `import qkit` first, or use "
            "qkit.load"
        )
    return notes


def _stem(name: str) -> str | None:
    match = _ONE.match(name)
    return match[1] if match else None
