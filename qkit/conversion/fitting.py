"""--fit: the scheme of a conversion is the best uniform one with which the result fits a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import QkitError
from .options import Options

if TYPE_CHECKING:
    from ..sources.types import Source
    from ..spec import LayerSpec

CONTEXT, BATCH = 8192, 1


def check(options: Options) -> None:
    """Refuse what does not go together with --fit, and what means nothing without it."""
    if options.fit is None:
        for name in ("context", "batch"):
            if getattr(options, name) is not None:
                raise QkitError(f"--{name} belongs to --fit", "say which device with --fit, such as --fit rtx-4090")
        return
    for name, why in (
        ("scheme", "both choose the scheme"),
        ("recipe", "its rules choose schemes themselves"),
        ("skip", "--fit is for one scheme for all layers"),
    ):
        if getattr(options, name):
            raise QkitError(f"--fit and --{name} do not go together: {why}", f"drop --{name} or --fit")


def choose(options: Options, source: Source, stored: tuple[LayerSpec, ...]) -> tuple[Options, list[str]]:
    """(the options with a scheme, what to say of it). stored: the schemes of a quantized folder that is expanded.

    More bits than a quantized source has (a GGUF file: most of it) would hold nothing more.

    Raises QkitError where no scheme of the format fits, saying what would."""
    from ..estimate.steps import best_scheme
    from ..estimate.subject import main_spec
    from ..hardware.catalogue import parse
    from ..models.architecture import architecture

    check(options)
    if options.fit is None:
        return options, []
    targets = parse(options.fit)
    if len(targets) != 1:
        raise QkitError(f"--fit takes one device, not {len(targets)}", "name one, such as rtx-4090 or h100-sxm:2")
    arch = architecture(source.config)
    context = options.context or min(CONTEXT, arch.max_tokens or CONTEXT)
    main = main_spec(source)
    bits = max((spec.bits for spec in stored), default=main.bits if main else None)
    choice = best_scheme(arch, targets[0], context, options.batch or BATCH, options.format, bits)
    return replace(options, scheme=choice.scheme), [f"--fit chose {choice.words}"]
