"""What a plan makes of its options: whether source, recipe and method go together, and what is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..models.config import max_positions
from ..models.families import EXPECTED, FUSED_EXPERTS, TOWERS, check_blocks, why_kept
from ..models.skeleton import check_architecture
from ..spec import PRESETS, Recipe
from ..text.read import check_spec
from .options import AS_STORED, Options
from .tasks import Task

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..methods import Method
    from ..sources.types import Source

_MUCH = 0.05  # of a model's weights


def check_source(source: Source) -> None:
    """Refuse a checkpoint of a family that qkit does not quantize, or not all there."""
    if source.config.get("model_type") in ("gpt2", "gptj", "codegen"):
        raise QkitError(
            f"{source.config['model_type']} checkpoints store transposed or fused linears that qkit does not quantize",
            "use a llama, mistral, qwen or gemma family model",
        )
    check_blocks(source.config, source.names(), source.label)


def check_recipe(recipe: Recipe, options: Options, fmt: Format) -> Recipe:
    for scheme in recipe.schemes if fmt.kinds else ():
        if scheme.kind not in fmt.kinds:
            known = [name for name, found in PRESETS.items() if found is not None and found.kind in fmt.kinds]
            raise QkitError(
                f"format {fmt.name} does not hold {scheme.describe()}", f"schemes that it holds: {', '.join(known)}"
            )
    if options.format != "gguf" and (not recipe.schemes) != (options.format == "safetensors"):
        what = "--recipe" if options.recipe else f"--scheme {options.scheme}"
        raise QkitError(
            f"--format {options.format} and {what} do not go together",
            "--format safetensors and --format gguf export without quantizing (--scheme none)",
        )
    return recipe


def choose_method(
    recipe: Recipe, options: Options, source: Source, calibrated: str, observed: bool
) -> tuple[Method, list[str]]:
    """The method, with the default said, and its options checked. calibrated: the format's, for less than 8 bits;
    observed: the model runs on the calibration text for any method."""
    from .. import methods

    notes: list[str] = []
    name = options.method
    if not recipe.schemes or (name is None and options.scheme == AS_STORED):
        name = "rtn"
    elif name is None:
        bits = min(scheme.bits for scheme in recipe.schemes)
        able = all(methods.get(calibrated).check(scheme) is None for scheme in recipe.schemes)
        name = calibrated if bits < 8 and able else "rtn"
        notes.append(f"method {name} (the default at {bits} bits)")
    method = methods.get(name)
    for scheme in recipe.schemes:
        problem = method.check(scheme)
        if problem:
            raise QkitError(problem, "choose another --scheme or --method")
    if method.needs or observed:
        check_architecture(source.config)
        check_spec(options.calib)
        longest = max_positions(source.config)
        if longest is not None and options.calib_len > longest:
            raise QkitError(
                f"--calib-len {options.calib_len} is longer than the {longest} tokens the model takes",
                f"use --calib-len {longest} or less",
            )
    elif options.calib is not None:
        raise QkitError(f"--calib is not used by method {name}", "drop it, or use --method gptq")
    if options.clip_search and any(scheme.kind == "ggml" for scheme in recipe.schemes):
        raise QkitError("--clip-search does not apply to GGUF", "its scales are always searched: drop it")
    for own in {option for other in methods.METHODS.values() for option in other.options} - set(method.options):
        if getattr(options, own):
            owners = ", ".join(other.name for other in methods.METHODS.values() if own in other.options)
            raise QkitError(f"--{own.replace('_', '-')} belongs to --method {owners}, not to {name}", "drop it")
    return method, notes


def of_what_stays(tasks: Sequence[Task]) -> list[str]:
    """What to say where much of a model stays as it is, and neither the user nor the format asked for that."""
    if not any(t.scheme for t in tasks):
        return []
    total = max(1, sum(t.numel for t in tasks))
    kept = [t for t in tasks if t.scheme is None and why_kept(t.name, t.meta) == t.reason and len(t.meta.shape) > 1]
    kept = [t for t in kept if not TOWERS.search(t.name)]
    fused = [t for t in kept if t.reason == FUSED_EXPERTS]
    others = [t for t in kept if t.reason not in (FUSED_EXPERTS, *EXPECTED)]
    notes = []
    if fused:
        notes.append(
            f"WARNING: {len(fused)} tensors hold all experts of a layer at once, in a way that is not known here, and "
            f"are not quantized: {_share(fused, total)}"
        )
    if sum(t.numel for t in others) > _MUCH * total:
        most = max(others, key=lambda t: t.numel)
        notes.append(
            f"WARNING: {len(others)} matrices are not known as linears of a decoder block ({most.name}: {most.reason}) "
            f"and are not quantized: {_share(others, total)}"
        )
    return notes


def _share(tasks: Sequence[Task], total: int) -> str:
    share = sum(t.numel for t in tasks) / total
    return f"{share:.0%} of the model stays at 16 bits ({units.size(sum(t.bytes_out for t in tasks))})"
