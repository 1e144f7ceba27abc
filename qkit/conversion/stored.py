"""A source that is quantized already: expanded for reading, and its own schemes as the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.families import module_of, why_kept
from ..spec import Keep, LayerSpec, Recipe, Rule
from .options import Options

if TYPE_CHECKING:
    from ..formats.expanded import Expanded
    from ..sources.types import Source


def expand(source: Source) -> Expanded | None:
    """A source that is quantized in a format that qkit reads, as one that is not; None for one that is not.

    Raises QkitError for a method that is not read."""
    from ..formats.expanded import Expanded
    from ..sources.lora import LoraSource
    from ..sources.types import found_in

    if not (source.config.get("quantization_config") or source.config.get("compression_config")):
        return None
    if found_in(source, LoraSource):
        raise QkitError(
            "an adapter is merged into weights that are not quantized",
            "convert the original checkpoint with --lora, or serve the adapter beside the quantized model",
        )
    return Expanded(source)


def stored_recipe(source: Expanded, options: Options) -> Recipe:
    """As the source has it: --skip first; what it keeps is kept."""
    skipped = [Rule(p, Keep("skipped on request"), origin=f"--skip {p!r}") for p in options.skip]
    kept = [
        Rule(_literal(module_of(name)), Keep("not quantized in the source"))
        for name in source.names()
        if name not in source.schemes and why_kept(name, source.meta(name)) is None
    ]
    schemes = list(dict.fromkeys(source.schemes.values()))
    if len(schemes) == 1:
        return Recipe((*skipped, *kept, Rule("*", schemes[0])))
    own = [Rule(_literal(module_of(name)), scheme) for name, scheme in source.schemes.items()]
    return Recipe((*skipped, *kept, *own))


def _literal(module: str) -> str:
    """A shell pattern that matches the name alone."""
    return re.sub(r"([*?[])", r"[\1]", module)


def notes_of(source: Expanded, choices: Mapping[str, LayerSpec | Keep]) -> list[str]:
    """What becomes of the weights that are quantized already."""
    from ..formats.expanded import same_grid

    made = {n: c for n in source.schemes if isinstance(c := choices.get(n), LayerSpec)}
    done = [n for n, c in made.items() if same_grid(source.schemes[n], c)]
    types = {(source.schemes[n].scale_dtype, made[n].scale_dtype) for n in done}
    notes = []
    if done:
        notes.append(f"{len(done)} weights are repacked: their codes stay as they are, none is rounded anew")
    notes += [f"their scales are rounded from {a} to {b}" for a, b in sorted(types) if a != b and b == "BF16"]
    again, values = len(made) - len(done), len(source.schemes) - len(made)
    if again:
        notes.append(
            f"{again} weights that are quantized already are dequantized and rounded anew: the errors of both add up"
        )
    if values:
        notes.append(f"{values} weights that are quantized already are dequantized and stored as values")
    return notes
