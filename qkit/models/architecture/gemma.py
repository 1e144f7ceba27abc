"""Gemma 3n and Gemma 4: keys and values that layers share, embeddings of each layer's own, two kinds of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import QkitError
from . import kinds
from .attention import grouped
from .keys import Keys
from .mlp import Moe, mixture
from .part import Part, Place, linears
from .types import Matrix

if TYPE_CHECKING:
    from .family import Family


def shares(k: Keys, at: Place) -> bool:
    """Whether a layer takes keys and values of an earlier one."""
    return at.index >= k.size("num_hidden_layers") - k.size("num_kv_shared_layers", 0, least=0)


def without_keys(part: Part) -> Part:
    own = tuple(m for m in part.matrices if not m.name.endswith((".k_proj", ".v_proj")))
    return replace(part, matrices=own, vectors=part.vectors - part.head_dim, caches=())


def gemma3n(k: Keys, f: Family, at: Place) -> Part:
    part = grouped(k, f, at)
    return without_keys(part) if shares(k, at) else part


def each_layer(k: Keys, at: Place) -> Part:
    """What brings a layer's own embeddings in."""
    hidden, each = k.size("hidden_size"), k.size("hidden_size_per_layer_input", 0, least=0)
    if not each:
        return Part()
    part = linears(at.layer, "mlp", ("per_layer_input_gate", each, hidden), ("per_layer_projection", hidden, each))
    return part + Part((), hidden)


def tables(k: Keys) -> tuple[tuple[Matrix, ...], int]:
    """Those embeddings, and what mixes them with the model's."""
    hidden, each = k.size("hidden_size"), k.size("hidden_size_per_layer_input", 0, least=0)
    if not each:
        return (), 0
    all_layers, rows = k.size("num_hidden_layers") * each, k.size("vocab_size_per_layer_input")
    table = Matrix("model.embed_tokens_per_layer", rows, all_layers, "embedding", active=0)
    return (table, Matrix("model.per_layer_model_projection", all_layers, hidden, "other")), each


def gemma3n_extra(k: Keys, f: Family, at: Place) -> Part:
    """AltUp, LAuReL and embeddings of a layer's own."""
    hidden, inputs, rank = k.size("hidden_size"), k.size("altup_num_inputs"), k.size("laurel_rank")
    shapes = (
        ("correction_coefs", inputs, inputs), ("prediction_coefs", inputs * inputs, inputs),
        ("modality_router", inputs, hidden),
    )  # fmt: skip
    altup = linears(f"{at.layer}.altup", "other", *shapes)
    laurel = linears(f"{at.layer}.laurel", "mlp", ("linear_left", rank, hidden), ("linear_right", hidden, rank))
    # Norms of LAuReL and of AltUp's router, and the scale of its output.
    return altup + laurel + each_layer(k, at) + Part((), 3 * hidden)


def gemma3n_outside(k: Keys, f: Family) -> tuple[tuple[Matrix, ...], int]:
    hidden, inputs = k.size("hidden_size"), k.size("altup_num_inputs")
    made, small = tables(k)
    altup = tuple(
        Matrix(f"model.{name}.{index}", hidden, hidden, "other")
        for name in ("altup_projections", "altup_unembed_projections")
        for index in range(min(inputs, 1 << 10) - 1)
    )
    return (*made, *altup), small


def gemma4_layers(k: Keys, layers: int) -> list[str]:
    """Every sixth layer, and the last, attends to everything."""
    return [kinds.SLIDING if (i + 1) % 6 and i < layers - 1 else kinds.FULL for i in range(layers)]


def gemma4(k: Keys, f: Family, at: Place) -> Part:
    """Layers that attend to everything have larger heads, and may take their keys for values."""
    whole, same = at.kind == kinds.FULL, k.flag("attention_k_eq_v")
    config = dict(k.config)
    if whole:
        config["head_dim"] = k.size("global_head_dim", 512)
        if same and k.get("num_global_key_value_heads") is not None:
            config["num_key_value_heads"] = k.size("num_global_key_value_heads")
    config |= _own(k, at.index)
    part = grouped(Keys(config, k.model_type, k.where), f, at)
    if shares(k, at):
        return without_keys(part)
    if same and whole:
        part = replace(part, matrices=tuple(m for m in part.matrices if not m.name.endswith(".v_proj")))
    return part


def _own(k: Keys, index: int) -> dict[str, object]:
    """What transformers wrote for one layer alone."""
    given = k.get("per_layer_config")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise QkitError("per_layer_config in config.json is not an object", "check config.json")
    own = next((value for key, value in given.items() if str(key).lstrip("0") == str(index or "")), None)
    if not isinstance(own, Mapping):
        return {}
    return {key: own[key] for key in ("head_dim", "num_key_value_heads") if key in own}


def gemma4_width(k: Keys, at: Place) -> int:
    width = k.size("intermediate_size")
    return 2 * width if k.flag("use_double_wide_mlp") and shares(k, at) else width


_EXPERTS = Moe(block="", router="router.proj")


def gemma4_extra(k: Keys, f: Family, at: Place) -> Part:
    """Embeddings of a layer's own, experts beside the MLP, a scale of the layer."""
    part = each_layer(k, at) + Part((), 1)
    if not k.flag("enable_moe_block"):
        return part
    hidden = k.size("hidden_size")
    experts = mixture(k, f, _EXPERTS, at)
    # Three more norms, the router's scales of inputs and of experts; the MLP beside them counts too.
    both = experts.wide + k.size("intermediate_size")
    return part + replace(experts, wide=both) + Part((), 4 * hidden + k.size("num_experts"))
