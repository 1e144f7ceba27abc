"""`profile`: load a model, measure memory, speed and quality on the device that is here, write the report."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..hardware import memory as process
from ..hardware.catalogue import catalogue
from ..hardware.detect import LocalDevice, resolve
from ..models.config import positive_int, text_config
from ..options import command_line, with_options
from ..progress import notify, track
from ..report import write as report
from ..text import defaults as text
from . import memory, speed
from .options import Options
from .types import EvaluationText, Memory, Profile, Row

if TYPE_CHECKING:
    import torch

    from ..sources.types import Source
    from .quality import Quality

HEADLINE = "llama.cpp"  # the protocol that thresholds and headlines use; the report shows both
N_CTX = 512

FORMULAS = {
    "weights": "sum over the loaded model's parameters and buffers, each storage once",
    "bits per weight": "8 x bytes of tensor data on disk / parameters of the unquantized model",
    "total memory": "weights + KV cache at the whole context and the largest batch (by formula) + activations",
    "perplexity": "exp(mean of -ln p(token)), error: perplexity x sqrt(var / (n - 1))",
    "KL divergence": "mean over tokens of sum over the vocabulary of p_base (ln p_base - ln p_model)",
    "top-1 agreement": "share of tokens where both models' most likely token is the same",
    "scored tokens": "llama.cpp: positions n_ctx/2 .. n_ctx-2 of each chunk; full: positions 0 .. n_ctx-2",
}


@with_options(Options)
def profile(model: str, options: Options) -> Profile:
    """Measure a model on this machine and write profile.json, profile.md and profile.html.

    model  a converted folder, or anything `open_source` takes

    The evaluation text is checked to share no passage with the calibration text that the model's manifest names.
    Thresholds: see `Profile.failures`; max_kld is held against the mean KL divergence of the "llama.cpp" protocol.
    Raises QkitError for bad options, a device that is not here, overlapping texts, a model that does not fit.
    """
    from ..runtime import load_tokenizer
    from ..sources import open_source
    from . import quality

    baseline, batch, max_kld, min_tps = options.baseline, options.batch, options.max_kld, options.min_tps
    if max_kld is not None and baseline is None:
        raise QkitError("--max-kld needs a model to compare with", "name the unquantized model with --baseline")
    where = resolve(options.device)
    source = open_source(model)
    base_source = open_source(baseline) if baseline else None
    identity, manifest_sha = _manifest(source.folder)
    limit = _max_positions(source)
    context = _context(options.context, limit)
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    tokens, evaluated = _evaluation(options, tokenizer, min(N_CTX, limit), identity)
    for each in [s for s in (source, base_source) if s]:
        _check_fit(each, where)
    folder = _out_folder(options.out, model)

    import torch

    target = torch.device(where.id)
    ceiling = speed.read_ceiling(target)
    prompt = _prompt(tokens, min(context, limit - speed.GENERATED))
    named = [(model, source), *([(baseline, base_source)] if baseline and base_source else [])]
    loaded = [_load(name, each, where) for name, each in named]
    instances = [each.model for each in loaded]
    runs: list[list[speed.Run]] = []
    times = {"repeats": speed.REPEATS, "generated": speed.GENERATED}
    with track("speed and memory", len(named) * len(batch) * (speed.REPEATS + 1), "runs") as advance:
        for size in batch:
            runs.append(speed.measure(instances, prompt.repeat(size, 1), ceiling, advance, **times))
    rows = [_row(each, list(own), where, context) for each, own in zip(loaded, zip(*runs, strict=True), strict=True)]
    with track("quality", len(tokens)) as advance:
        logits = [quality.model_logits(instance) for instance in instances]
        if len(logits) == 2:
            scores = quality.compare(logits[1], logits[0], tokens, advance)
        else:
            scores = quality.perplexity(logits[0], tokens, advance)

    thresholds = {k: v for k, v in (("max_kld", max_kld), ("min_tps", min_tps)) if v is not None}
    result = Profile(
        model=rows[0],
        baseline=rows[1] if len(rows) > 1 else None,
        quality=scores,
        text=evaluated,
        device=_device_facts(where, ceiling),
        provenance={
            **_versions(),
            "command": shlex.join(["qkit", "profile", model, *command_line(options)]),
            "headline_protocol": HEADLINE,
            "model_fingerprint": source.fingerprint,
            "baseline_fingerprint": base_source.fingerprint if base_source else None,
            "manifest_sha256": manifest_sha,
            "conversion": _conversion(identity),
        },
        thresholds=thresholds,
        failures=_failures(thresholds, scores, rows[0]),
        formulas={**FORMULAS, **speed.FORMULAS, "KV cache": rows[0].memory.kv_formula},
        out=str(folder),
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


def _manifest(folder: Path | None) -> tuple[dict[str, Any], str | None]:
    """(identity of the conversion, sha256 of the manifest file); ({}, None) where there is no manifest."""
    from ..storage.manifest import MANIFEST, Manifest
    from ..storage.store import at, hash_file

    manifest = Manifest.find(folder)
    if folder is None or manifest is None:
        return {}, None
    return manifest.identity, hash_file(at(folder), MANIFEST).sha256


def _conversion(identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest's identity without the sketch, which says nothing to a reader."""
    calibration = identity.get("calibration")
    if isinstance(calibration, dict):
        return {**identity, "calibration": {k: v for k, v in calibration.items() if k != "sketch"}}
    return identity


def _max_positions(source: Source) -> int:
    return positive_int(text_config(source.config), "max_position_embeddings", 1 << 30)


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
    from ..text.windows import read_text, token_windows

    named = text.evaluation_text() if options.text is None else read_text(options.text, tokenizer)
    tokens, used, bos = token_windows(named, tokenizer, options.chunks, n_ctx, allow_fewer=True)
    calibration = identity.get("calibration")
    if isinstance(calibration, dict) and calibration.get("sketch"):
        shared = text.overlap(calibration["sketch"], used)
        if shared.count and not options.allow_overlap:
            raise QkitError(
                f"the evaluation text {named.name} shares {shared.fraction:.1%} of its words with the text that the "
                f"model was calibrated on, for instance: {shared.example[:120]!r}",
                "evaluate on another text with --text FILE, or accept it, said in the report, with --allow-overlap",
            )
        name = calibration.get("name")
        if shared.count:
            verdict = f"OVERLAPS: {shared.fraction:.1%} of its words stand in the calibration text {name} (allowed)"
        else:
            verdict = f"checked: no passage of 20 or more words in common with the calibration text {name}"
    elif isinstance(calibration, dict):
        verdict = "not checked: the model's manifest holds no sketch of its calibration text"
    elif identity:
        verdict = "nothing to check: the model was converted without calibration text"
    else:
        verdict = "not checked: the model has no qkit manifest"
    return tokens, EvaluationText(named.name, named.sha256, len(tokens), n_ctx, bos, verdict)


def _check_fit(source: Source, where: LocalDevice) -> None:
    """Refuse a model whose weights alone exceed the free memory, before they are read."""
    needed = sum(source.meta(name).nbytes for name in source.names())
    if needed > where.available_bytes:
        raise QkitError(
            f"{source.label} needs {units.size(needed)} for its weights; {where.id} has "
            f"{units.size(where.available_bytes)} free",
            "use a smaller model, or a device with more memory",
        )


def _prompt(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [1, length] of evaluation text, repeated where it is too short: speed does not depend on its sense."""
    flat = tokens.flatten()
    return flat.repeat(-(-length // len(flat)))[:length].unsqueeze(0)


@dataclass(frozen=True)
class _Loaded:
    """A model in memory, and the process's resident bytes around loading it."""

    name: str
    source: Source
    model: Any
    before: int
    after: int


def _load(name: str, source: Source, where: LocalDevice) -> _Loaded:
    from ..runtime import load

    before = process.resident()
    model = load(source, device=where.id)
    return _Loaded(name, source, model, before, process.resident())


def _row(loaded: _Loaded, runs: list[speed.Run], where: LocalDevice, context: int) -> Row:
    from ..inspection import inspect
    from ..runtime import QuantLinear

    facts = inspect(loaded.name)
    model = loaded.model
    parts = memory.weights(model)
    itemsize = model.dtype.itemsize
    largest = max(runs, key=lambda r: r.speed.batch)
    at_context, formula = memory.kv_formula(model.config, context, largest.speed.batch, itemsize)
    total = parts.total + at_context + largest.activations
    used = Memory(
        weights=parts.total,
        packed=parts.packed,
        embeddings=parts.embeddings,
        unquantized=parts.unquantized,
        kv_cache=largest.kv_bytes,
        kv_tokens=largest.kv_tokens,
        kv_cache_formula=memory.kv_formula(model.config, largest.kv_tokens, largest.speed.batch, itemsize)[0],
        kv_cache_context=at_context,
        kv_formula=formula,
        activations=largest.activations,
        activations_source=largest.activations_source,
        process_before=loaded.before,
        process_after=loaded.after,
        total=total,
        device_bytes=where.memory_bytes,
        fits=total <= where.memory_bytes,
    )
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return Row(
        name=loaded.name,
        base_model=loaded.source.base_model,
        architecture=facts.architecture,
        parameters=facts.parameters,
        stored_bytes=facts.nbytes,
        bits_per_weight=facts.bits_per_weight,
        dtype=str(model.dtype).removeprefix("torch."),
        schemes=dict(facts.schemes),
        kernels=dict(Counter(layer.select(model.dtype).name for layer in layers)),
        memory=used,
        speed=tuple(r.speed for r in runs),
    )


def _device_facts(where: LocalDevice, ceiling: float) -> dict[str, Any]:
    import torch

    known = next((d for d in catalogue() if d.id == where.catalogue_id), None)
    return {
        **asdict(where),
        "threads": torch.get_num_threads() if where.id == "cpu" else None,
        "read_ceiling_gbs": ceiling,
        "catalogue": asdict(known) if known else None,
    }


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    from .. import __version__
    from ..kernels import backend

    return {
        "qkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": backend(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _failures(thresholds: dict[str, float], scores: Quality, row: Row) -> tuple[str, ...]:
    failures = []
    against = scores[HEADLINE].against
    if "max_kld" in thresholds and against and against.kld.value > thresholds["max_kld"]:
        failures.append(f"mean KL divergence {against.kld.value:.4f} is above {thresholds['max_kld']:g}")
    first = row.speed[0]
    if "min_tps" in thresholds and first.decode_tps < thresholds["min_tps"]:
        failures.append(
            f"decode at batch {first.batch} gives {first.decode_tps:.1f} tokens/s, below {thresholds['min_tps']:g}"
        )
    if not row.memory.fits:
        notify(f"warning: {units.size(row.memory.total)} do not fit the device's {units.size(row.memory.device_bytes)}")
    return tuple(failures)
