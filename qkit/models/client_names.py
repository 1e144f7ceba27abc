"""What loaders call the modules of a checkpoint: transformers renames some as it loads, and configs match its names.

Gemma3's files say language_model.model.layers.0, its modules model.language_model.layers.0; PhiMoE's router is
block_sparse_moe.gate on disk and mlp.router in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import architectures, text_config


@dataclass(frozen=True)
class ClientNames:
    """names    module on disk -> module in transformers' model, where there is one
    linears  names of all linear layers in transformers' model"""

    names: Mapping[str, str]
    linears: frozenset[str]

    def all_of(self, module: str) -> tuple[str, ...]:
        """The names under which some loader knows a module of the files."""
        own = self.names.get(module, module)
        return (module,) if own == module else (module, own)


def needed(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether loaders may have other names than the files: text models inside others, experts and their routers."""
    return isinstance(config.get("text_config"), Mapping) or any(
        ".experts." in name or "router" in name or name.endswith(".gate") for name in modules
    )


def merges_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers' own loading makes one tensor of experts that are stored one matrix each."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import MergeModulelist

    kinds = {str(part["model_type"]) for part in (config, text_config(config)) if part.get("model_type")}
    found = [each for kind in kinds for each in get_checkpoint_conversion_mapping(kind) or ()]
    return any(isinstance(op, MergeModulelist) for each in found for op in getattr(each, "operations", ()))


def client_names(config: Mapping[str, Any], modules: Iterable[str]) -> ClientNames | None:
    """The names in transformers' model, which is built without weights; None where transformers cannot build it."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    given = {k: v for k, v in config.items() if k != "quantization_config"}
    named = architectures(given)
    cls = getattr(transformers, named[0], None) if named else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):  # and nothing else is called
        return None
    if str(given.get("model_type")) not in CONFIG_MAPPING:
        return None
    try:
        parsed = CONFIG_MAPPING[given["model_type"]].from_dict(given)
        with torch.device("meta"):
            model = cls(parsed)
        keys = model.state_dict()
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    except Exception:  # whatever a model's constructor makes of an odd config
        return None
    linears = frozenset(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    names: dict[str, str] = {}
    for module in modules:
        key = f"{module}.weight"
        if key not in keys:
            key, _ = rename_source_key(key, renamings, [], model.base_model_prefix, keys)
        if key in keys:
            names[module] = key.removesuffix(".weight")
    return ClientNames(names, linears)
