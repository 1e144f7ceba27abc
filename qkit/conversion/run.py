"""The one data path: Source -> Plan -> (statistics, by block) -> shards -> config and card -> verify -> rename."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hardware import memory
from ..options import identity, with_options
from ..progress import notify
from .options import Options
from .output import Out
from .plan import Plan, make_plan

if TYPE_CHECKING:
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from ..text.windows import CalibrationSet
    from .executor import Executor


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did. seconds and peak_memory (resident, bytes) are measured; None after a dry run.

    fallbacks: "weight name: reason" for each layer that did not get the method asked for."""

    plan: Plan
    out: Out
    seconds: float | None = None
    peak_memory: int | None = None
    fallbacks: tuple[str, ...] = ()
    resumed: bool = False
    already_done: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.as_dict(),
            "out": str(self.out),
            "seconds_measured": self.seconds,
            "peak_memory_measured_bytes": self.peak_memory,
            "fallbacks": list(self.fallbacks),
            "resumed": self.resumed,
            "already_done": self.already_done,
        }


@with_options(Options)
def convert(
    source: str,
    out: str | os.PathLike[str],
    options: Options,
) -> ConvertResult:
    """Quantize a checkpoint into the folder `out`, which appears, complete, as the last step.

    source  folder of safetensors, .gguf file, Hub id or "demo"; s3://, gs:// and hf:// are read where they lie
    out     a folder, or s3://bucket/prefix or gs://bucket/prefix, complete once its manifest says so

    The same source, options and version give byte-identical files. An interrupted run continues when called
    again with the same arguments. Raises QkitError for bad input, before any tensor is read.
    """
    from ..sources import open_source
    from . import finish
    from .execute import STATISTICS, write_weights
    from .output import finished, open_work, resolve_out
    from .verify import check_inherited, verify_result

    started = time.perf_counter()
    opened = open_source(source, lora=options.lora, ranged=options.dry_run)  # a plan takes headers alone
    place = resolve_out(out, (source, options.lora, options.calib, options.recipe, options.fit))
    plan = make_plan(opened, place, options)
    opened = plan.original
    if options.dry_run:
        return ConvertResult(plan, plan.out)
    for note in plan.notes:
        notify(note)
    calibration = _calibration(plan, opened) if plan.calibrates else None
    made_of = _identity(plan, opened, calibration)
    done = finished(plan.out, made_of, options.restart)
    if done is not None:
        return ConvertResult(plan, plan.out, fallbacks=_fallbacks(done), already_done=True)

    tokens = None if calibration is None else calibration.tokens
    expected = [*(s.file for s in plan.shards), *finish.companion_names(plan, opened), STATISTICS]
    with _executor(plan, source, options) as executor, open_work(plan, made_of, expected) as work:
        if work.inherited:
            notify(f"resuming in {work.label}")
            check_inherited(plan, work, executor)
        write_weights(plan, opened, work, executor, tokens)
        finish.write_companions(plan, opened, work)
        if options.verify:
            verify_result(plan, work)
        finish.complete(work)
        work.publish()
    seconds, resumed = time.perf_counter() - started, bool(work.inherited)
    return ConvertResult(plan, plan.out, seconds, memory.peak_resident(), _fallbacks(work.manifest), resumed)


@contextmanager
def _executor(plan: Plan, source: str, options: Options) -> Iterator[Executor]:
    """What computes: threads here, or the workers of a cluster."""
    if options.ray is None:
        from .executor import Threads

        yield Threads(plan.predicted.workers)
        return
    from .cluster import Cluster
    from .pool import job_of
    from .ray_pool import connected

    with connected(options.ray) as pool:
        nodes = [node for node in pool.nodes() if node.cpus]
        notify(f"Ray cluster: {len(nodes)} machine(s), {sum(node.cpus for node in nodes)} core(s)")
        yield Cluster(pool, job_of(source, options, plan), plan.predicted.workers)


def _calibration(plan: Plan, source: Source) -> CalibrationSet:
    from ..text.tokenizer import load_tokenizer
    from ..text.windows import calibration_tokens, check_vocabulary

    o = plan.options
    tokenizer = load_tokenizer(source, o.trust_remote_code)
    calibration = calibration_tokens(o.calib, tokenizer, o.calib_samples, o.calib_len)
    check_vocabulary(calibration.tokens, source, tokenizer)
    notify(f"calibrating on {calibration.tokens.shape[0]} x {calibration.tokens.shape[1]} tokens of {calibration.name}")
    if calibration.note:
        notify(calibration.note)
    return calibration


def _identity(plan: Plan, source: Source, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Everything that decides the output's bytes; no paths, times or machine names."""
    from .. import __version__

    made_of: dict[str, Any] = {
        "qkit": __version__,
        "source": {"base_model": source.base_model, "fingerprint": source.fingerprint},
        "method": plan.method.name,
        "recipe": plan.recipe.as_list(),
        "calibration": None,
        **identity(plan.options),
    }
    if calibration is not None:
        import torch
        import transformers

        # Sums may round differently in another release or on another kind of device. Threads and processor are
        # recorded with each weight instead: a run goes on wherever it is continued.
        made_of["compute"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": plan.device.partition(":")[0],
        }
        made_of["calibration"] = {
            "name": calibration.name,
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "length": calibration.tokens.shape[1],
            "sketch": calibration.sketch,
        }
    parsed: dict[str, Any] = json.loads(json.dumps(made_of))  # as a manifest gives it back
    return parsed


def _fallbacks(manifest: Manifest) -> tuple[str, ...]:
    return tuple(f"{name}: {t['fallback']}" for name, t in manifest.tensors.items() if t.get("fallback"))
