"""`qkit profile` where it predicts: devices of the catalogue, cards, or a model of which there is a config alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..hardware.catalogue import parse
from ..hardware.device import Target
from ..options import command_line
from ..report.folder import NAMES, out_folder
from ..report.predicted.wording import thresholds
from ..report.predicted.write import write
from .document import provenance
from .estimate import Asked, Estimate, estimate
from .render import describe
from .result import Predicted

if TYPE_CHECKING:
    from ..measure.options import Options

HERE = ("auto", "cpu", "cuda")  # what a device of this machine is called


def is_here(device: str) -> bool:
    """Whether a name means a device of this machine."""
    return device.strip().lower().partition(":")[0] in HERE


def predict(models: Sequence[str], targets: Sequence[Target], options: Options) -> Predicted:
    """Each of `models` on each of `targets`; the report is written into `options.out`.

    Raises QkitError for options that only a measurement has, and as `estimate` does."""
    for name in ("baseline", "text", "max_kld", "endpoint"):
        if getattr(options, name, None) is not None:
            raise QkitError(
                f"--{name.replace('_', '-')} is for what is measured, and nothing is on a device that is not here",
                "leave it out, or name a device of this machine: `qkit devices` lists those",
            )
    if len(options.batch) > 1:
        raise QkitError("a prediction takes one --batch", "its report has a curve over others")
    asked = Asked(
        context=options.context, batch=options.batch[0], format=options.format, scheme=options.scheme,
        engine=options.engine, kv_cache=options.kv_cache, usd_per_hour=options.price_per_hour,
        hosted=options.api_price, utilization=options.utilization, inputs=options.input_tokens,
    )  # fmt: skip
    estimates = tuple(estimate(model, targets, asked) for model in models)
    command = shlex.join(["qkit", "profile", *models, *command_line(options)])
    folder = out_folder(options.out, models)
    given = {} if options.min_tps is None else {"min_tps": options.min_tps}
    failures = _missed(estimates, options.min_tps)
    result = Predicted(estimates, provenance(command), given, failures, str(folder))
    write(result, folder)
    return result


def targets_of(devices: Sequence[str]) -> tuple[Target, ...]:
    """The targets of --device. Raises QkitError, with the closest names, for one that is unknown."""
    return parse(list(devices))


def _missed(estimates: Sequence[Estimate], min_tps: float | None) -> tuple[str, ...]:
    """Each device that is too slow, and each of which nobody knows."""
    found = []
    for each in estimates if min_tps is not None else ():
        for a in each.answers:
            of = f"{each.subject.label} on {a.target.spec}: "
            if a.speeds is None:
                found.append(f"{of}the speed is unknown ({a.unknown}), --min-tps is {min_tps:g}")
            elif a.speeds.decode.tokens_per_s < (min_tps or 0.0):
                found.append(f"{of}{a.speeds.decode.tokens_per_s:.1f} tokens/s predicted, below {min_tps:g}")
    return tuple(found)


def summary(result: Predicted) -> str:
    """What the command line prints: each model in text, and where the report is."""
    met = thresholds(result)
    said = [*([met] if met else []), f"report: {Path(result.out) / NAMES[2]}"]
    return "\n\n".join([*(describe(each) for each in result.estimates), "\n".join(said)])
