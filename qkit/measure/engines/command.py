"""`qkit profile --engine NAME`: what the options of a profile ask of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import QkitError
from ...progress import notify, track
from . import table
from .plan import needed_cache, plan
from .sweep import sweep
from .types import Sweep

if TYPE_CHECKING:
    from ...hardware.detect import LocalDevice
    from ..fit import Sizes
    from ..options import Options


def check(options: Options, models: Sequence[str]) -> None:
    """Raises QkitError where the engine that the options name is not there, or does not run one of the models."""
    if options.engine is None:
        if options.engine_python is not None:
            raise QkitError("--engine-python needs an engine", "name it with --engine vllm or --engine llama.cpp")
        return
    kind = table.get(options.engine)
    for model in models:
        kind.place(model)
    table.python_with(kind, options.engine_python)


def sweeps(
    options: Options, models: Sequence[tuple[str, Sizes]], tokens: Sequence[int], where: LocalDevice
) -> tuple[Sweep, ...]:
    """One sweep for each model in the engine that the options name; none where they name none.

    tokens: ids of text. To be called while this process holds no model: each gets a process, and the free memory."""
    if options.engine is None:
        return ()
    kind = table.get(options.engine)
    plans = [
        plan(sizes, options.batch, options.sweep, free=where.available_bytes, whole=kind.whole) for _, sizes in models
    ]
    found = []
    with track(f"sweep in {kind.name}", sum(map(len, plans)), "points") as advance:
        for (name, sizes), points in zip(models, plans, strict=True):
            run = [point for point in points if point.skipped is None]
            caches = [needed_cache(sizes, point.batch, point.prompt + point.generated) for point in run]
            result = sweep(
                name,
                kind.name,
                points,
                tokens,
                device=where.id,
                python=options.engine_python,
                cache_bytes=max(caches, default=0),
                progress=advance,
            )
            if result.problem:
                notify(f"warning: the sweep of {name} in {kind.name} ended early: {result.problem}")
            found.append(result)
    return tuple(found)
