"""A profile's rows and facts, from what was measured and what the headers say."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..hardware.catalogue import catalogue
from ..inspection import inspect, without_sketch
from . import memory
from .footprint import Footprint
from .predicted import beside
from .types import Formula, Measured, Memory, Speed

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..hardware.detect import LocalDevice
    from ..storage.store import Store
    from .fit import Sizes
    from .quality import Quality
    from .room import Subject


@dataclass(frozen=True)
class Run:
    """What a model was as it ran."""

    weights: memory.Weights
    dtype: torch.dtype
    kernels: Mapping[str, int]


def of_loaded(model: Any) -> Run:
    from ..runtime import QuantLinear

    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return Run(memory.weights(model), model.dtype, Counter(layer.select(model.dtype).name for layer in layers))


def measured(
    subject: Subject,
    run: Run,
    found: Footprint | str,
    where: LocalDevice,
    context: int,
    batch: int,
    speeds: Sequence[Speed],
    speed_how: str,
    faster: float | None = None,
    quality: Quality | None = None,
    problems: Sequence[str] = (),
    predicted: dict[str, Any] | None = None,
) -> Measured:
    """One model's row. found: what its own process saw, or why that failed; batch: the largest; speeds: one a batch
    size, or none; predicted: what was said of it before."""
    facts, source = inspect(subject.name), subject.source
    taken = used(run.weights, found, where, context, batch)
    identity, sha256 = manifest(source.folder)
    return Measured(
        name=subject.name,
        base_model=source.base_model,
        architecture=facts.architecture,
        parameters=facts.parameters,
        stored_bytes=facts.nbytes,
        stored_types=dict(source.stored.types),
        stored_quantized=source.stored.quantized,
        bits_per_weight=facts.bits_per_weight,
        dtype=str(run.dtype).removeprefix("torch."),
        schemes=dict(facts.schemes),
        kernels=dict(run.kernels),
        memory=taken,
        formula=formula(subject.sizes, context, batch),
        loaded=subject.loaded,
        speed=tuple(speeds),
        speed_how=speed_how,
        faster=faster,
        quality=quality,
        on_frontier=None,
        overlap=subject.overlap,
        problems=tuple(problems),
        fingerprint=source.fingerprint,
        manifest_sha256=sha256,
        conversion=conversion(identity),
        active_parameters=subject.sizes.arch.active_parameters,
        predicted=predicted and beside(predicted, speeds, taken),
    )


def used(parts: memory.Weights, found: Footprint | str, where: LocalDevice, context: int, batch: int) -> Memory:
    """What was measured; where the model's own process failed, its weights and why the rest is unknown."""
    seen = found if isinstance(found, Footprint) else None
    return Memory(
        weights=parts.total,
        packed=parts.packed,
        embeddings=parts.embeddings,
        unquantized=parts.unquantized,
        tokens=context,
        batch=batch,
        kv_cache=seen.kv_cache if seen else None,
        activations=seen.activations if seen else None,
        process=seen.process if seen else None,
        total=seen.total if seen else None,
        host=seen.host if seen else None,
        seen=seen.seen if seen else None,
        problem=found if isinstance(found, str) else None,
        free_bytes=where.available_bytes,
        device_bytes=where.memory_bytes,
        fits=seen.total <= where.available_bytes if seen else None,
    )


def formula(sizes: Sizes, context: int, batch: int) -> Formula:
    at_context, words = sizes.kv(context, batch)
    most = sizes.max_tokens
    return Formula(
        weights=sizes.weights,
        kv_cache=at_context,
        kv_formula=words,
        max_tokens=most,
        kv_cache_max=sizes.kv(most, batch)[0] if most else None,
    )


def device_facts(where: LocalDevice, ceiling: float) -> dict[str, Any]:
    import torch

    known = next((d for d in catalogue() if d.id == where.catalogue_id), None)
    return {
        **asdict(where),
        "threads": torch.get_num_threads() if where.id == "cpu" else None,
        "read_ceiling_gbs": ceiling,
        "catalogue": asdict(known) if known else None,
    }


def versions() -> dict[str, Any]:
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


def manifest(folder: Path | Store | None) -> tuple[dict[str, Any], str | None]:
    """(identity of the conversion, sha256 of the manifest file); ({}, None) where there is no manifest."""
    from ..storage.local import at
    from ..storage.manifest import MANIFEST, Manifest
    from ..storage.store import hash_file

    found = Manifest.find(folder)
    if folder is None or found is None:
        return {}, None
    return found.identity, hash_file(at(folder), MANIFEST).sha256


def conversion(identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest's identity without the sketch of the calibration text."""
    return {**identity, "calibration": without_sketch(identity.get("calibration"))} if identity else identity
