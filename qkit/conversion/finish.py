"""What a converted folder holds besides its weights: config, index, sidecars, model card; all of it hashed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..models.families import module_of
from .card import card

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source
    from .plan import Plan
    from .workspace import Workspace

INDEX = "model.safetensors.index.json"
CARD = "README.md"


def companion_names(plan: Plan, source: Source, fmt: Format) -> list[str]:
    """The files that `write_companions` writes."""
    return sorted({*_generated(plan, source, fmt, None), CARD, *(sidecar.name for sidecar in source.sidecars)})


def write_companions(plan: Plan, source: Source, fmt: Format, work: Workspace) -> None:
    """Write everything but the weights into the workspace and note it in the manifest."""
    from ..storage.manifest import file_entry
    from ..storage.writer import write_file

    files = _generated(plan, source, fmt, work.manifest.identity["calibration"])
    files[CARD] = card(plan, source, work.manifest).encode()
    for sidecar in source.sidecars:
        if sidecar.name not in files:
            files[sidecar.name] = sidecar.read()
    for name, data in sorted(files.items()):
        work.manifest.files[name] = file_entry(write_file(work.store, name, data))
    work.manifest.save(work.folder)


def complete(work: Workspace) -> None:
    """Mark the folder complete: its last change before it gets its name."""
    work.manifest.complete = True
    work.manifest.save(work.folder)


def _generated(plan: Plan, source: Source, fmt: Format, calibration: dict[str, Any] | None) -> dict[str, bytes]:
    """Config and index: everything that is made, but for the card."""
    config = dict(source.config)
    files: dict[str, bytes] = {}
    if plan.kinds:
        options = {"method": plan.method.name, "calibration": calibration}
        schemes = {module_of(name): scheme for name, scheme in plan.schemes.items()}
        config["quantization_config"] = fmt.config(schemes, plan.ignored, options)
        files.update(fmt.extra_files(config["quantization_config"]))
    return {**files, "config.json": _json(config), INDEX: _json(index(plan))}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in plan.shards for t in shard.tasks for name, _ in t.outputs}
    return {"metadata": {"total_size": plan.bytes_out}, "weight_map": dict(sorted(weight_map.items()))}
