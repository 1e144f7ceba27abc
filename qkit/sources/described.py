"""A checkpoint of which the config, or the config and the headers, are looked at: enough to say what it will take."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import QkitError
from ..models.config import check_names
from ..storage.files import read_json
from ..storage.local import at
from .headers import Headers
from .types import Source

CONFIG = "config.json"


def is_config_alone(spec: str) -> bool:
    """Whether a name is a config.json here, or a folder that holds one and no weights."""
    path = Path(os.path.expanduser(spec)) if spec else Path()
    try:
        return bool(spec) and (
            (path.is_file() and path.suffix.lower() == ".json") or (path.is_dir() and _only_config(path))
        )
    except (OSError, ValueError):
        return False


def describe_source(spec: str) -> Source:
    """A checkpoint by its headers, or by its config where there are no weights: a config.json, a folder with one,
    whatever `open_source` takes; of a Hub id the headers alone are asked for.

    Raises QkitError for what is none of these."""
    from . import DEMO, is_hub_id, open_source

    path = Path(os.path.expanduser(spec)) if spec else Path()
    if spec and spec != DEMO:
        try:
            if is_config_alone(spec):
                return _config_alone(*((path, CONFIG) if path.is_dir() else (path.parent, path.name)), spec)
            here = path.exists()
        except (OSError, ValueError):
            here = False
        if not here and is_hub_id(spec):
            from .hub import describe_hub

            return describe_hub(spec)
    return open_source(spec)


def _only_config(folder: Path) -> bool:
    names = {name.lower() for name in os.listdir(folder)}
    weights = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")
    return CONFIG in names and not any(name.endswith(weights) for name in names)


def _config_alone(folder: Path, name: str, label: str) -> Headers:
    config = read_json(at(folder), name, "it should be a model's config.json")
    if not isinstance(config, dict) or not ({"model_type", "architectures", "text_config"} & set(config)):
        raise QkitError(f"{label} is not a model's config", "name a config.json as the Hub has it, with model_type")
    check_names(config)
    kind = config.get("model_type")
    named = config.get("_name_or_path")
    base = named if isinstance(named, str) and named and not named.startswith((".", os.sep)) else f"{kind} model"
    return Headers(label, base, config, {})
