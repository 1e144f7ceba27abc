"""A family that is not known, by the keys that most configs have."""

from __future__ import annotations

from dataclasses import replace

from ...errors import QkitError
from .attention import latent
from .family import Family
from .keys import Keys
from .mlp import Moe, Shared, after_first, stepwise

# What a decoder cannot be described without.
_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


def usual(k: Keys) -> Family:
    """Llama's layers, or DeepSeek's and experts where a config has their keys.

    Raises QkitError naming what is missing."""
    missing = [name for name in _NEEDED if k.get(name) is None]
    if k.get("intermediate_size") is None and k.get("moe_intermediate_size") is None:
        missing.append("intermediate_size")
    if missing:
        raise QkitError(
            f"model_type {k.model_type!r} is not known here, and config.json lacks {', '.join(missing)}",
            "these keys describe a decoder whose family is not known",
        )
    family = Family(qk_norm="head", qk_norm_if="use_qk_norm" if k.has("use_qk_norm") else "qk_norm")
    if k.get("kv_lora_rank") is not None and k.get("qk_rope_head_dim") is not None:
        family = replace(family, mixer=latent)
    if k.get("num_experts") and k.get("num_experts_per_tok"):
        shared = Shared("mlp.shared_experts")
        if k.get("shared_expert_intermediate_size") is not None:
            shared = Shared("mlp.shared_expert", width="shared_expert_intermediate_size")
        sparse = stepwise if k.has("decoder_sparse_step") else after_first
        widths = ("moe_intermediate_size", "intermediate_size")
        family = replace(family, moe=Moe(sparse=sparse, width=widths, shared=shared))
    return family
