"""`qkit profile --endpoint URL`: the load test with the options of a profile, and its report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import QkitError
from ...options import command_line
from ...report.folder import save
from ...report.layout import as_json
from . import page, render, run
from .types import Endpoint

if TYPE_CHECKING:
    from ..options import Options

NAMES = ("endpoint.json", "endpoint.md", "endpoint.html")
# What a running server has decided already, or does not say.
_APART = ("baseline", "device", "max_kld", "engine", "engine_python", "sweep", "batch", "allow_overlap")


def profile_endpoint(model: str | None, options: Options, folder: Path) -> Endpoint:
    """Measure `options.endpoint` and write the report into `folder`, which is there. model: the name it serves.

    --min-tps holds for the output tokens a second of the first concurrency. Raises QkitError as `measure_endpoint`
    does, and for options that are for models in files."""
    assert options.endpoint is not None
    defaults = type(options)()
    for name in _APART:
        if getattr(options, name) != getattr(defaults, name):
            flag = "--" + name.replace("_", "-")
            raise QkitError(f"{flag} is for models in files, not for a running server", f"leave out {flag}")
    found = run.measure_endpoint(
        options.endpoint,
        model=model,
        context=options.context or run.CONTEXT,
        max_tokens=options.max_tokens,
        concurrency=options.concurrency,
        requests=options.requests,
        level_seconds=options.level_seconds,
        timeout=options.timeout,
        text=options.text,
        api_key_file=options.api_key_file,
    )
    command = shlex.join(["qkit", "profile", *([model] if model else []), *command_line(options)])
    result = replace(found, provenance={**found.provenance, "command": command}, out=str(folder))
    if options.min_tps is not None:
        result = _held(result, options.min_tps)
    write(result, folder)
    return result


def _held(result: Endpoint, least: float) -> Endpoint:
    first = result.levels[0]
    missed = f"concurrency {first.concurrency} gives {first.output_tps:.1f} tokens/s, below {least:g}"
    failures = result.failures if first.output_tps >= least else (*result.failures, missed)
    return replace(result, thresholds={"min_tps": least}, failures=failures)


def write(result: Endpoint, folder: Path) -> list[Path]:
    """Write the three files into `folder`, each whole or not at all. Raises QkitError where that fails."""
    return save(folder, (as_json(result.as_dict()), render.markdown(result), page.html(result)), NAMES)
