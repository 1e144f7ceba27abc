"""`profile`: load one model after another, measure memory, speed and quality on the device that is here, write the
report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..hardware import memory as process
from ..hardware.detect import is_present, local_target, resolve
from ..models.config import max_positions
from ..options import command_line, with_options
from ..progress import notify, track
from ..report import write as report
from ..report.folder import out_folder
from ..text.tokenizer import held
from . import bench, evaluation, facts, fit, footprint, predicted, room, speed
from .endpoint.command import profile_endpoint
from .endpoint.run import default_name
from .engines import command as engines
from .engines.bandwidth import with_bandwidth
from .engines.render import FORMULAS as SWEEP_FORMULAS
from .frontier import Point, on_frontier
from .options import Options
from .types import Failed, Measured, Profile

if TYPE_CHECKING:
    import torch

    from ..estimate.result import Predicted
    from ..hardware.detect import LocalDevice
    from ..hardware.device import Target
    from .endpoint import Endpoint
    from .room import Room, Subject

HEADLINE = "llama.cpp"  # the protocol that thresholds and headlines use; the report shows both
N_CTX = 512
_WORKING = 128 << 20  # bytes that this process takes beside models and tokenizers once they run: code, text, allocators

FORMULAS = {
    "weights": "sum over the loaded model's parameters and buffers, each storage once",
    "bits per weight": "8 x bytes of tensor data on disk / parameters of the unquantized model",
    "memory, measured": "each model in a process of its own that fills its KV cache with --context tokens in each "
    "of the largest --batch sequences; the total is the most it holds, and activations are what no other row explains",
    "process": "what it holds beside the weights after a short warm-up: Python, torch, libraries; on a GPU the "
    "driver's context and the kernels' code",
    "free": "of the device, before a model was loaded; within a container's limit",
    "predicted": "from the headers, before the model runs, for the same device, prompt, batch and context: a roofline "
    "whose rates are fitted (profiles/speed.json), on a CPU with the read ceiling as its bandwidth; bytes by formula. "
    "error: predicted / measured - 1",
    "perplexity": "exp(mean of -ln p(token)), error: perplexity x sqrt(var / (n - 1))",
    "KL divergence": "mean over tokens of sum over the vocabulary of p_base (ln p_base - ln p_model)",
    "top-1 agreement": "share of tokens where both models' most likely token is the same",
    "scored tokens": "llama.cpp: positions n_ctx/2 .. n_ctx-2 of each chunk; full: positions 0 .. n_ctx-2",
}


@with_options(Options)
def profile(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (), *, options: Options
) -> Profile | Endpoint | Predicted:
    """Measure models on this machine and write profile.json, profile.md and profile.html; or predict them.

    models  a converted folder, or anything `open_source` takes; several are measured one after the other. With
            `endpoint` the name of a model there, or none
    Devices that are not here, `predict`, and models of which there is a config alone are predicted: nothing is loaded.

    Each is loaded, timed and scored, and freed before the next. The baseline stays loaded beside them where both fit;
    else it leaves its last hidden states and its head behind. What does not fit the memory runs block by block, and is
    scored but not timed.
    The evaluation text is checked to share no passage with the calibration texts that the models' manifests name.
    Thresholds: see `Profile.failures`; max_kld is held against the mean KL divergence of the "llama.cpp" protocol.
    Raises QkitError for bad options, a device that is not here, overlapping texts, other tokenizers, a model that does
    not fit even block by block, and where nothing could be measured.
    """
    names = _names(models)
    if options.endpoint is not None:
        if len(names) > 1:
            raise QkitError("--endpoint takes the name of one model", "run it once for each")
        return profile_endpoint(
            names[0] if names else None, options, out_folder(options.out, [default_name(options.endpoint)])
        )
    if not names:
        raise QkitError(
            "no model was named", "name a folder, a .gguf file, a Hub id, demo, or a running server with --endpoint URL"
        )
    targets = _targets(names, options)
    if targets is not None:
        from ..estimate.command import predict

        return predict(names, targets, options)
    return _measured(names, options)


def _targets(names: Sequence[str], options: Options) -> tuple[Target, ...] | None:
    """The devices that are predicted; None where it is this machine's that is measured."""
    from ..estimate.command import is_here, targets_of
    from ..sources.described import is_config_alone

    here = [name for name in options.device if is_here(name)]
    if here and len(options.device) > 1:
        raise QkitError(
            f"--device {' '.join(options.device)}: {here[0]} is of this machine, and one at a time is measured",
            "name devices of the catalogue to predict them, or one of this machine",
        )
    if not here:
        targets = targets_of(options.device)
        alone = len(targets) == 1 and targets[0].count == 1 and not options.predict
        return None if alone and is_present(targets[0].device.id) else targets
    if any(is_config_alone(name) for name in names):
        return targets_of(("all",))
    return (local_target(resolve(options.device[0])),) if options.predict else None


def _measured(names: list[str], options: Options) -> Profile:
    if options.max_kld is not None and options.baseline is None:
        raise QkitError("--max-kld needs a model to compare with", "name the unquantized model with --baseline")
    where = resolve(options.device[0])
    engines.check(options, names)
    subjects = [_open(name) for name in names]
    baseline = _open(options.baseline) if options.baseline else None
    everyone = [*subjects, *([baseline] if baseline else [])]
    limit = min(max_positions(each.source.config) or 1 << 30 for each in everyone)
    context = _context(options.context, limit)
    n_ctx = min(N_CTX, limit)
    # Two tokenizers at a time are compared.
    tokenizers = 2 * max(held(each.source) for each in everyone)
    allowed = _allowed(where, options.max_memory, tokenizers)
    placed = room.divide(subjects, baseline, allowed, context, max(options.batch), options.chunks, n_ctx)
    tokens, text, checked = evaluation.prepare(placed.models, placed.baseline, options, n_ctx)
    placed = replace(placed, models=checked)
    folder = out_folder(options.out, names)

    # Before this process holds a model, for the same reason.
    sweeps = engines.sweeps(
        options, [(each.name, each.sizes) for each in placed.models if each.loaded], tokens.flatten().tolist(), where
    )
    rows, base, failed, ceiling = _measure(placed, where, tokens, context, limit, options)
    sources = {each.name: each.source for each in placed.models}
    sweeps = tuple(with_bandwidth(each, sources[each.model], where.device_class, ceiling) for each in sweeps)
    rows = _with_frontier(rows, base)
    thresholds = {k: v for k in ("max_kld", "min_tps") if (v := getattr(options, k)) is not None}
    result = Profile(
        models=tuple(rows),
        baseline=base,
        failed=tuple(failed),
        text=text,
        device=facts.device_facts(where, ceiling),
        provenance={
            **facts.versions(),
            "command": shlex.join(["qkit", "profile", *names, *command_line(options)]),
            "headline_protocol": HEADLINE,
            "memory_allowed": allowed.available_bytes,
        },
        thresholds=thresholds,
        failures=(),
        formulas={
            **FORMULAS,
            **speed.FORMULAS,
            **(SWEEP_FORMULAS if sweeps else {}),
            "KV cache, by formula": rows[0].formula.kv_formula,
        },
        out=str(folder),
        sweeps=sweeps,
    )
    result = replace(result, failures=(*_missed(result), *result.problems))
    report.write(result, folder)
    return result


def _measure(
    placed: Room, where: LocalDevice, tokens: torch.Tensor, context: int, limit: int, options: Options
) -> tuple[list[Measured], Measured | None, list[Failed], float]:
    """(the models' rows, the baseline's, models that failed, GB/s at which the device reads memory).

    Raises what failed where nothing was measured."""
    import torch

    everyone = [*placed.models, *([placed.baseline] if placed.baseline else [])]
    seen = _footprints(everyone, where, tokens, context, max(options.batch))
    ceiling = speed.read_ceiling(torch.device(where.id))
    prompt = _prompt(tokens, min(context, limit - speed.GENERATED))
    asked = predicted.Asked(prompt.shape[1], speed.GENERATED, options.batch[0], context, max(options.batch))
    said = {each.name: predicted.before(each.source, where, ceiling, asked) for each in everyone}
    session = bench.Bench(where, tokens, prompt, context, options.batch, ceiling, said)
    base = None
    if placed.baseline:
        base = bench.Baseline(session, placed.baseline, seen[-1], placed.beside)
        bench.free(where.id)
    rows: list[Measured] = []
    failed: list[Failed] = []
    first: Exception | None = None
    for subject, found in zip(placed.models, seen, strict=False):
        try:
            rows.append(bench.measure(session, subject, found, base))
        except Exception as error:  # whatever it is, the other models are measured
            notify(f"warning: {subject.name} was not measured: {bench.said(error)}")
            failed.append(Failed(subject.name, bench.said(error)))
            first = first or error
        bench.free(where.id)
    if first is not None and not rows:
        raise first
    return rows, base.row() if base else None, failed, ceiling


def _footprints(
    subjects: Sequence[Subject], where: LocalDevice, tokens: torch.Tensor, context: int, batch: int
) -> list[footprint.Footprint | str]:
    """While this process holds no model: two processes with one each may be more than there is memory for."""
    filled = _prompt(tokens, context)[0].tolist()
    found: list[footprint.Footprint | str] = []
    with track("memory, each model in a process of its own", len(subjects), "models") as advance:
        for each in subjects:
            if each.loaded:
                found.append(footprint.apart(each.name, where.id, filled, batch, where.available_bytes))
            else:
                found.append("it does not fit, and ran block by block")
            advance(1)
    return found


def _names(models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    names = [os.fspath(each) for each in given]
    for name in names:
        if names.count(name) > 1:
            raise QkitError(f"{name} is named twice")
    return names


def _open(name: str) -> Subject:
    from ..sources import open_source

    source = open_source(name)
    sizes = fit.sizes(source)
    return room.Subject(name, source, sizes, room.parts(source, sizes.itemsize))


def _allowed(where: LocalDevice, most: int | None, beside: int) -> LocalDevice:
    """The device with what models may take of it: what is free, and at most what --max-memory leaves them. beside:
    bytes that this process is going to take for something else."""
    if most is None:
        return where
    if where.id == "cpu":
        import torch  # noqa: F401  for its share of what is resident
        from transformers import CONFIG_MAPPING

        CONFIG_MAPPING["llama"]  # the first look for any model loads 160 MB of transformers' modules
        most -= process.resident() + _WORKING + beside
    return replace(where, available_bytes=max(0, min(where.available_bytes, most)))


def _context(context: int | None, limit: int) -> int:
    if limit < speed.GENERATED + 8:
        raise QkitError(f"the model takes {limit} tokens; a profile generates {speed.GENERATED} after its prompt")
    if context is None:
        return min(N_CTX, limit)
    if context > limit:
        raise QkitError(f"the model takes at most {limit:,} tokens, not {context:,}", f"use --context {limit} or less")
    return context


def _prompt(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [1, length] of evaluation text, repeated where it is too short: speed does not depend on its sense."""
    flat = tokens.flatten()
    return flat.repeat(-(-length // len(flat)))[:length].unsqueeze(0)


def _with_frontier(rows: list[Measured], base: Measured | None) -> list[Measured]:
    """The rows with `on_frontier`, where quality is a divergence."""
    compared = [row for row in rows if row.quality and row.quality[HEADLINE].against]
    if base is None:
        return rows
    flags = on_frontier([_point(row) for row in compared])
    known = {row.name: flag for row, flag in zip(compared, flags, strict=True)}
    return [replace(row, on_frontier=known.get(row.name)) for row in rows]


def _point(row: Measured) -> Point:
    assert row.quality is not None
    against = row.quality[HEADLINE].against
    assert against is not None
    # Against the baseline's runs at the same time where there were such: a machine is not as fast at any time.
    rate = row.speed[0].generate_tps if row.speed else None
    return Point(row.stored_bytes, against.kld.value, row.faster or rate)


def _missed(result: Profile) -> list[str]:
    """Thresholds that a model misses, or that cannot be held because the figure is missing."""
    found = []
    base = result.baseline
    for row in result.models:
        of = f"{row.name}: " if len(result.models) > 1 else ""
        most, least = (result.thresholds.get(name) for name in ("max_kld", "min_tps"))
        against = row.quality[HEADLINE].against if row.quality else None
        if most is not None and base is not None:
            if against is None:
                found.append(f"{of}the KL divergence was not measured, --max-kld is {most:g}")
            elif against.kld.value > most:
                words = f"mean KL divergence {against.kld.value:.4f} {base.as_baseline}".rstrip()
                found.append(f"{of}{words} is above {most:g}")
        if least is not None:
            if not row.speed:
                found.append(f"{of}the speed was not measured, --min-tps is {least:g}")
            elif row.speed[0].generate_tps < least:
                first = row.speed[0]
                found.append(
                    f"{of}generate at batch {first.batch} gives {first.generate_tps:.1f} tokens/s, below {least:g}"
                )
    for row in [*result.models, *([base] if base else [])]:
        used = row.memory
        if used.problem and row.loaded:
            notify(f"warning: the memory of {row.name} was not measured: {used.problem}")
        elif used.fits is False:
            total, free = units.size(used.total or 0), units.size(used.free_bytes)
            notify(f"warning: the {total} that {row.name} takes do not fit the {free} that were free")
    return found
