"""What a converted folder holds besides its weights: config, index, sidecars, model card; all of it hashed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import card

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from .plan import Plan

INDEX = "model.safetensors.index.json"
CARD = "README.md"


def write_companions(plan: Plan, source: Source, fmt: Format, folder: Path, manifest: Manifest) -> None:
    """Write everything but the weights into `folder`, note it in the manifest and mark that complete."""
    from .. import formats
    from ..storage.manifest import file_entry
    from ..storage.writer import write_file

    config = dict(source.config)
    files: dict[str, bytes] = {}
    if plan.scheme is not None:
        options = {"method": plan.method, "calibration": manifest.identity["calibration"]}
        config["quantization_config"] = fmt.config(
            {t.name.removesuffix(".weight"): t.scheme for t in plan.tensors if t.scheme}, plan.ignored, options
        )
        files.update(formats.extra_files(config))
    files["config.json"] = _json(config)
    files[INDEX] = _json(index(plan))
    files[CARD] = card(plan, source, manifest).encode()
    for sidecar in source.sidecars:
        if sidecar.name not in files:
            files[sidecar.name] = sidecar.read()
    for name, data in sorted(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = write_file(path, data)
        manifest.files[name] = file_entry(digest)
    manifest.complete = True
    manifest.save(folder)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in plan.shards for t in shard.tensors for name, _ in t.outputs}
    return {"metadata": {"total_size": plan.bytes_out}, "weight_map": dict(sorted(weight_map.items()))}
