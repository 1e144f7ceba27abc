"""`profile`: load a model, measure memory, speed and quality on the device that is here, write the report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..hardware.detect import resolve
from ..models.config import max_positions
from ..options import command_line, with_options
from ..progress import notify, track
from ..report import write as report
from . import facts, fit, footprint, speed
from .endpoint.command import profile_endpoint
from .endpoint.run import default_name
from .engines import command as engines
from .engines.render import FORMULAS as SWEEP_FORMULAS
from .options import Options
from .types import EvaluationText, Measured, Profile

if TYPE_CHECKING:
    import torch

    from .endpoint import Endpoint
    from .quality import Quality

HEADLINE = "llama.cpp"  # the protocol that thresholds and headlines use; the report shows both
N_CTX = 512
# Share of the evaluated words that may stand in the calibration text, as licences, boilerplate and quotations do: a
# hundredth moves a mean by far less than its error, and one copied document in fifty is above it.
MOST_SHARED = 0.01

FORMULAS = {
    "weights": "sum over the loaded model's parameters and buffers, each storage once",
    "bits per weight": "8 x bytes of tensor data on disk / parameters of the unquantized model",
    "memory, measured": "each model in a process of its own that fills its KV cache with --context tokens in each "
    "of the largest --batch sequences; the total is the most it holds, and activations are what no other row explains",
    "process": "what it holds beside the weights after a short warm-up: Python, torch, libraries; on a GPU the "
    "driver's context and the kernels' code",
    "free": "of the device, before a model was loaded; within a container's limit",
    "perplexity": "exp(mean of -ln p(token)), error: perplexity x sqrt(var / (n - 1))",
    "KL divergence": "mean over tokens of sum over the vocabulary of p_base (ln p_base - ln p_model)",
    "top-1 agreement": "share of tokens where both models' most likely token is the same",
    "scored tokens": "llama.cpp: positions n_ctx/2 .. n_ctx-2 of each chunk; full: positions 0 .. n_ctx-2",
}


@with_options(Options)
def profile(model: str | None = None, *, options: Options) -> Profile | Endpoint:
    """Measure a model on this machine and write profile.json, profile.md and profile.html.

    model  a converted folder, or anything `open_source` takes; with `endpoint` the name of a model there, or None

    The evaluation text is checked to share no passage with the calibration text that the model's manifest names.
    Thresholds: see `Profile.failures`; max_kld is held against the mean KL divergence of the "llama.cpp" protocol.
    Raises QkitError for bad options, a device that is not here, overlapping texts, a model that does not fit.
    """
    if options.endpoint is not None:
        return profile_endpoint(model, options, _out_folder(options.out, default_name(options.endpoint)))
    if model is None:
        raise QkitError("there is no model to measure", "name one, or a running server with --endpoint URL")
    from ..runtime import load, load_tokenizer
    from ..sources import open_source
    from . import quality

    baseline, batch, max_kld, min_tps = options.baseline, options.batch, options.max_kld, options.min_tps
    if max_kld is not None and baseline is None:
        raise QkitError("--max-kld needs a model to compare with", "name the unquantized model with --baseline")
    where = resolve(options.device)
    engines.check(options, [model])
    source = open_source(model)
    base_source = open_source(baseline) if baseline else None
    identity, manifest_sha = facts.manifest(source.folder)
    limit = max_positions(source.config) or 1 << 30
    context = _context(options.context, limit)
    n_ctx = min(N_CTX, limit)
    named = [(model, source), *([(baseline, base_source)] if baseline and base_source else [])]
    sizes = [fit.sizes(each) for _, each in named]
    fit.check(sizes, where, context, max(batch), n_ctx)
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    tokens, evaluated = _evaluation(options, tokenizer, n_ctx, identity)
    folder = _out_folder(options.out, model)

    import torch

    # First, while this process holds no model: two processes with one each may be more than there is memory for.
    seen = []
    with track("memory, each model in a process of its own", len(named), "models") as advance:
        filled = _prompt(tokens, context)[0].tolist()
        for name, _ in named:
            seen.append(footprint.apart(name, where.id, filled, max(batch), where.available_bytes))
            advance(1)
    sweeps = engines.sweeps(options, [(model, sizes[0])], tokens.flatten().tolist(), where)
    target = torch.device(where.id)
    ceiling = speed.read_ceiling(target)
    prompt = _prompt(tokens, min(context, limit - speed.GENERATED))
    instances = [load(each, device=where.id) for _, each in named]
    runs: list[list[speed.Speed]] = []
    times = {"repeats": speed.REPEATS, "generated": speed.GENERATED}
    with track("speed", len(named) * len(batch) * (speed.REPEATS + 1), "runs") as advance:
        for size in batch:
            runs.append(speed.measure(instances, prompt.repeat(size, 1), ceiling, advance, **times))
    lines = [
        facts.measured(name, each, instance, size, found, speeds, where, context)
        for (name, each), instance, size, found, speeds in zip(
            named, instances, sizes, seen, zip(*runs, strict=True), strict=True
        )
    ]
    with track("quality", len(tokens)) as advance:
        logits = [quality.model_logits(instance) for instance in instances]
        if len(logits) == 2:
            scores = quality.compare(logits[1], logits[0], tokens, advance)
        else:
            scores = quality.perplexity(logits[0], tokens, advance)

    thresholds = {k: v for k, v in (("max_kld", max_kld), ("min_tps", min_tps)) if v is not None}
    result = Profile(
        model=lines[0],
        baseline=lines[1] if len(lines) > 1 else None,
        quality=scores,
        text=evaluated,
        device=facts.device_facts(where, ceiling),
        provenance={
            **facts.versions(),
            "command": shlex.join(["qkit", "profile", model, *command_line(options)]),
            "headline_protocol": HEADLINE,
            "model_fingerprint": source.fingerprint,
            "baseline_fingerprint": base_source.fingerprint if base_source else None,
            "manifest_sha256": manifest_sha,
            "conversion": facts.conversion(identity),
        },
        thresholds=thresholds,
        failures=_failures(thresholds, scores, lines),
        formulas={
            **FORMULAS,
            **speed.FORMULAS,
            **(SWEEP_FORMULAS if sweeps else {}),
            "KV cache, by formula": lines[0].formula.kv_formula,
        },
        out=str(folder),
        sweeps=sweeps,
    )
    report.write(result, folder)
    return result


def _out_folder(out: str | None, model: str) -> Path:
    name = Path(model.rstrip("/")).name.removesuffix(".gguf") or "model"
    folder = Path(out) if out else Path("qkit-profile") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QkitError(
            f"the report's folder {folder} cannot be made: {error.strerror}", "choose another with -o"
        ) from None
    return folder


def _context(context: int | None, limit: int) -> int:
    if limit < speed.GENERATED + 8:
        raise QkitError(f"the model takes {limit} tokens; a profile generates {speed.GENERATED} after its prompt")
    if context is None:
        return min(N_CTX, limit)
    if context > limit:
        raise QkitError(f"the model takes at most {limit:,} tokens, not {context:,}", f"use --context {limit} or less")
    return context


def _evaluation(
    options: Options, tokenizer: Any, n_ctx: int, identity: dict[str, Any]
) -> tuple[torch.Tensor, EvaluationText]:
    from ..text.defaults import evaluation_text
    from ..text.read import read_text
    from ..text.sketch import overlap
    from ..text.windows import token_windows

    named = evaluation_text() if options.text is None else read_text(options.text, tokenizer)
    tokens, prefix, bos = token_windows(named, tokenizer, options.chunks, n_ctx, allow_fewer=True)
    calibration = identity.get("calibration")
    if isinstance(calibration, dict) and calibration.get("sketch"):
        shared = overlap(calibration["sketch"], named.words(prefix))
        name = calibration.get("name")
        if shared.fraction > MOST_SHARED and not options.allow_overlap:
            raise QkitError(
                f"the evaluation text {named.name} shares {shared.fraction:.1%} of its words with the text that the "
                f"model was calibrated on, for instance: {shared.example[:120]!r}",
                "evaluate on another text with --text FILE, or accept it, said in the report, with --allow-overlap",
            )
        if shared.fraction > MOST_SHARED:
            verdict = f"OVERLAPS: {shared.fraction:.1%} of its words stand in the calibration text {name} (allowed)"
        elif shared.count:
            verdict = (
                f"checked: {shared.fraction:.2%} of its words stand in passages of 13 or more in common with the "
                f"calibration text {name}"
            )
        else:
            verdict = f"checked: no passage of 20 or more words in common with the calibration text {name}"
    elif isinstance(calibration, dict):
        verdict = "not checked: the model's manifest holds no sketch of its calibration text"
    elif identity:
        verdict = "nothing to check: the model was converted without calibration text"
    else:
        verdict = "not checked: the model has no qkit manifest"
    return tokens, EvaluationText(named.name, named.sha256, len(tokens), n_ctx, bos, verdict)


def _prompt(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [1, length] of evaluation text, repeated where it is too short: speed does not depend on its sense."""
    flat = tokens.flatten()
    return flat.repeat(-(-length // len(flat)))[:length].unsqueeze(0)


def _failures(thresholds: dict[str, float], scores: Quality, lines: list[Measured]) -> tuple[str, ...]:
    failures = []
    row, base = lines[0], lines[-1]
    against = scores[HEADLINE].against
    if "max_kld" in thresholds and against and against.kld.value > thresholds["max_kld"]:
        words = f"mean KL divergence {against.kld.value:.4f} {base.as_baseline}".rstrip()
        failures.append(f"{words} is above {thresholds['max_kld']:g}")
    first = row.speed[0]
    if "min_tps" in thresholds and first.generate_tps < thresholds["min_tps"]:
        failures.append(
            f"generate at batch {first.batch} gives {first.generate_tps:.1f} tokens/s, below {thresholds['min_tps']:g}"
        )
    for each in lines:
        used = each.memory
        if used.problem:
            notify(f"warning: the memory of {each.name} was not measured: {used.problem}")
        elif used.fits is False:
            total, free = units.size(used.total or 0), units.size(used.free_bytes)
            notify(f"warning: the {total} that {each.name} takes do not fit the {free} that were free")
    return tuple(failures)
