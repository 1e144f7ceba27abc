"""The output head: kept, or quantized where the format can hold it; and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..sources.untied import EMBEDDING, HEAD, Untied, is_tied
from ..spec import AUTO_GROUP_SIZES, CHANNEL, Keep, LayerSpec, integer
from .options import Options

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source


def with_head(source: Source, fmt: Format, options: Options) -> Source:
    """The source with a head of its own, where one is to be quantized and the source ties it to the embedding.

    Raises QkitError for a format that holds no quantized head."""
    if options.head is None or options.head == "keep" or fmt.container == "gguf":
        return source
    if not fmt.holds_head:
        raise QkitError(
            f"format {fmt.name} holds no quantized head", "use --head keep, or compressed-tensors, gptq or gguf"
        )
    if is_tied(source):
        return Untied(source)
    if HEAD not in source.names():
        raise QkitError(f"{source.label} has no {HEAD} to quantize", "use --head keep")
    return source


def choose_head(
    choices: Mapping[str, LayerSpec | Keep], source: Source, fmt: Format, options: Options, dtype: str
) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
    """The choice for the head, and what the others would take. dtype: the model's."""
    if fmt.container == "gguf" or not any(isinstance(c, LayerSpec) for c in choices.values()):
        return choices, []
    own = HEAD if HEAD in choices else EMBEDDING if EMBEDDING in choices else None
    if own is None:
        return choices, []
    meta = source.meta(own)
    if len(meta.shape) != 2:
        return choices, []
    shape = (meta.shape[0], meta.shape[1])
    specs = {bits: _spec(bits, shape[1]) for bits in (8, 4) if fmt.holds_head}
    sizes = {bits: _bytes(fmt, shape, spec, dtype) for bits, spec in specs.items() if fmt.check(shape, spec) is None}
    notes = []
    if options.head in ("8bit", "4bit"):
        spec = fmt.scheme_for(_spec(int(options.head[0]), shape[1]), dtype)
        problem = fmt.check(shape, spec)
        if problem:
            raise QkitError(f"{HEAD}: {problem}", "use --head keep, or another --format")
        choices = {**choices, HEAD: spec}
        if isinstance(source, Untied):
            notes.append(
                f"the head is the embedding in the source; quantized it takes {units.size(sizes[spec.bits])} of its "
                f"own, and the embedding stays at {units.size(meta.nbytes)}"
            )
    elif sizes:
        tied = own == EMBEDDING
        others = ", ".join(
            f"--head {bits}bit {'adds' if tied else 'takes'} {units.size(n)}" for bits, n in sizes.items()
        )
        what = "embedding, which is the head too," if tied else "head"
        notes.append(f"the {what} stays at {meta.dtype}: {units.size(meta.nbytes)}; {others}")
    return choices, notes


def _spec(bits: int, columns: int) -> LayerSpec:
    if bits == 8:
        return integer(8, CHANNEL)
    return integer(4, next((size for size in AUTO_GROUP_SIZES if columns % size == 0), CHANNEL))


def _bytes(fmt: Format, shape: tuple[int, int], spec: LayerSpec, dtype: str) -> int:
    return sum(meta.nbytes for meta in fmt.out_metas(shape, fmt.scheme_for(spec, dtype)).values())
