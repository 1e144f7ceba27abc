"""LoRA adapters (PEFT) on top of packed linears: `qkit.lora`."""

from __future__ import annotations

import os
import warnings
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear

from ..errors import QkitError
from .linear import QuantLinear

# The others take the dense weight apart.
_INITS = (True, False, "gaussian", "eva")


def lora(config: LoraConfig | str | os.PathLike[str]) -> LoraConfig:
    """`config`, made to know packed linears: pass the result wherever PEFT takes a LoraConfig.

        model = get_peft_model(qkit.load(folder), qkit.lora(LoraConfig(target_modules=["q_proj", "v_proj"])))
        model = PeftModel.from_pretrained(qkit.load(folder), "adapter", config=qkit.lora("adapter"))

    config  a LoraConfig, or the folder of a saved adapter

    PEFT chooses the adapter's class by the type of the layer and offers no other place to add one than the config
    (developer guide "Custom models"). Merging is refused: the sum of packed weights and an adapter is not on the grid
    of the packed weights. Merge into the source instead: `qkit convert SOURCE --lora ADAPTER`.
    Raises QkitError for what needs dense weights: DoRA, PiSSA, OLoRA, LoftQ and the like.
    """
    if not isinstance(config, LoraConfig):
        loaded = PeftConfig.from_pretrained(os.fspath(config))
        if not isinstance(loaded, LoraConfig):
            raise QkitError(f"{os.fspath(config)} is a {type(loaded).__name__}, not a LoRA adapter")
        config = loaded
    init = config.init_lora_weights
    if init not in _INITS:
        raise QkitError(f"init_lora_weights={init!r} needs dense weights", "use True, False, 'gaussian' or 'eva'")
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        raise QkitError(
            "target_modules='all-linear' means nn.Linear to PEFT, which packed linears are not",
            "name them, for example ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']",
        )
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    return config


class QuantLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's own linear adapter; the layer under it is packed."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():  # that PEFT has not heard of the type: it has, from `lora`
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, *args, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if config.use_dora or (variant is not None and "ALora" not in type(variant).__name__):
            raise QkitError("this variant of LoRA needs dense weights", "use plain LoRA on packed linears")
        return variant

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise QkitError(
            "an adapter cannot be merged into packed weights: the sum is not on their grid",
            "merge it into the source: qkit convert SOURCE --lora ADAPTER",
        )
