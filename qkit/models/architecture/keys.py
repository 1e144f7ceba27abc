"""Values of a config.json as its class reads them: other names for one thing, defaults, and what is impossible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any, NoReturn

from ...errors import QkitError

# What families call the same thing; the first is the name used here.
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"),
    "max_position_embeddings": (
        "n_positions", "max_seq_len", "seq_length", "n_ctx", "context_length", "model_max_length",
        "max_target_positions", "max_sequence_length",
    ),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    "moe_intermediate_size": ("expert_ffn_hidden_size",),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
    "first_k_dense_replace": ("num_dense_layers",),
    "mamba_d_state": ("state_size", "ssm_state_size"),
    "mamba_d_conv": ("conv_kernel",),
    "mamba_expand": ("expand",),
    "mamba_dt_rank": ("time_step_rank",),
    "mamba_conv_bias": ("use_conv_bias",),
    "mamba_n_heads": ("mamba_num_heads", "n_mamba_heads", "num_heads"),
    "mamba_d_head": ("mamba_head_dim", "mamba_headdim", "head_dim"),
    "mamba_n_groups": ("n_groups", "mamba_ngroups"),
}  # fmt: skip
# Names on the Hub of what transformers calls something else.
_SAME = {"kimi_k2": "deepseek_v3", "qwen2_vl_text": "qwen2_vl_text"}
MOST_LAYERS = 1 << 12
MOST = 1 << 32  # of any other number
_HINT = "check config.json, or its origin"


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("qkit.models").joinpath("data/config_defaults.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)["defaults"]
    return found


def defaults(model_type: str) -> Mapping[str, Any]:
    """What transformers' config class of this type has where config.json says nothing; {} for one not listed."""
    return _table().get(_SAME.get(model_type, model_type), {})


class Keys:
    """Typed reading of one level of a config. Null counts as absent, but over a class's default, as in transformers."""

    def __init__(self, config: Mapping[str, Any], model_type: str, where: str = ""):
        self.config, self.model_type, self.where = config, model_type, where
        self.defaults = defaults(model_type)

    def has(self, name: str) -> bool:
        """Whether config.json itself says it, null or not."""
        return any(key in self.config for key in (name, *ALIASES.get(name, ())))

    def get(self, name: str) -> Any:
        """The value, under whatever name; None where it is absent or null."""
        names = (name, *ALIASES.get(name, ()))
        for values in (self.config, self.defaults):
            given = [values[key] for key in names if key in values]
            if given:
                return next((value for value in given if value is not None), None)
        return None

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`. Raises QkitError naming the key where it is missing or is none."""
        value = self.get(name)
        if value is None:
            if default is None:
                self.missing(name)
            return default
        if isinstance(value, float) and value.is_integer() and abs(value) < MOST:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise QkitError(
                f"{self._called(name)} in config.json is {_short(value)}, not a whole number from {least} to {most}",
                _HINT,
            )
        return value

    def at(self, name: str, index: int, default: int | None = None, least: int = 1) -> int:
        """The same, where a list has one for each layer."""
        value = self.get(name)
        if isinstance(value, list):
            own = (self.listed(name, index + 1) or [])[index]
            return Keys({name: own}, "", self.where).size(name, default, least)
        return self.size(name, default, least)

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 / MOST < value < MOST:
            raise QkitError(f"{self._called(name)} in config.json is {_short(value)}, not a number above 0", _HINT)
        return float(value)

    def flag(self, name: bool | str, default: bool = False) -> bool:
        """A constant, or the truth of a key."""
        if isinstance(name, bool):
            return name
        value = self.get(name)
        return default if value is None else bool(value)

    def listed(self, name: str, length: int | None = None) -> list[Any] | None:
        """A list, of `length` entries at least; None where it is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) < length):
            raise QkitError(
                f"{self._called(name)} in config.json is {_short(value)}"
                + (f", not a list of {length} entries" if length is not None else ", not a list"),
                _HINT,
            )
        return list(value) if length is None else list(value)[:length]

    def nested(self, name: str, model_type: str = "") -> Keys:
        """A part of the config, empty where it is absent. model_type: whose defaults it has where it names none."""
        value = self.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise QkitError(f"{self._called(name)} in config.json is {_short(value)}, not an object", _HINT)
        kind = value.get("model_type")
        return Keys(value, kind if isinstance(kind, str) and kind else model_type, self._called(name))

    def divided(self, name: str, by: str) -> int:
        """name / by, which must be whole."""
        whole, parts = self.size(name), self.size(by)
        if whole % parts:
            raise QkitError(
                f"{self._called(name)} {whole} in config.json is no multiple of {self._called(by)} {parts}", _HINT
            )
        return whole // parts

    def missing(self, name: str) -> NoReturn:
        raise QkitError(f"{self._called(name)} is missing in config.json", _HINT)

    def _called(self, name: str) -> str:
        """The name as this config, or its class, has it."""
        names = (name, *ALIASES.get(name, ()))
        for values in (self.config, self.defaults):
            found = next((key for key in names if key in values), None)
            if found is not None:
                name = found
                break
        return f"{self.where}.{name}" if self.where else name


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) or len(value) < 20 else f"of {len(value)} entries"
    return text if len(text) <= 60 else f"{text[:57]}..."
