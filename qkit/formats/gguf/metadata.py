"""A model's config.json as GGUF metadata (ggml/docs/gguf.md; defaults of the keys: llama.cpp, src/llama-model.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import QkitError
from ...models.config import positive_int, text_config
from ...sources.gguf.config import ARCHS, MISTRAL, MIXTRAL, Arch
from ...sources.gguf.rope import llama3_factors
from ...storage.gguf import Typed

# What transformers calls a model -> what the file does. Models of the first two are llama's there.
_ARCHS: dict[str, tuple[str, Arch]] = {
    MISTRAL.model_type: ("llama", MISTRAL),
    MIXTRAL.model_type: ("llama", MIXTRAL),
    **{arch.model_type: (name, arch) for name, arch in ARCHS.items()},
}
_GEMMA_PATTERN = 6  # llama.cpp's gemma3: every sixth layer attends to everything


@dataclass(frozen=True)
class Model:
    """name: of the architecture in the file; config: of the text model, every key that its class has."""

    name: str
    arch: Arch
    config: Mapping[str, Any]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def ignored_window(self) -> int | None:
        """A sliding window that llama.cpp does not apply to this architecture."""
        window = self.config.get("sliding_window")
        return int(window) if window and self.name == "llama" else None

    @property
    def heads_per_kv(self) -> int:
        return int(self.config["num_attention_heads"]) // int(self.config["num_key_value_heads"])


def model_of(config: Mapping[str, Any]) -> Model:
    """Raises QkitError for an architecture that has no place in a GGUF file here, or a variant of one."""
    from transformers import CONFIG_MAPPING

    text = dict(text_config(config))
    kind = text.get("model_type")
    if kind not in _ARCHS:
        known = ", ".join(_ARCHS)
        raise QkitError(f"architecture {kind!r} is not written to GGUF files", f"written: {known}")
    name, arch = _ARCHS[kind]
    text.pop("quantization_config", None)
    try:
        full = CONFIG_MAPPING[kind].from_dict(text).to_dict()
    except Exception as error:  # transformers' validators raise classes of their own
        raise QkitError(f"transcribing config.json failed: {error}", "check the values in config.json") from error
    heads = positive_int(full, "num_attention_heads", 1)
    full["head_dim"] = full.get("head_dim") or positive_int(full, "hidden_size", 1) // heads
    full["num_key_value_heads"] = positive_int(full, "num_key_value_heads", heads)
    if arch.experts and "num_local_experts" in full:
        full.setdefault("num_experts", full["num_local_experts"])
    model = Model(name, arch, full)
    _check(model)
    return model


def _check(model: Model) -> None:
    """Refuse what llama.cpp would compute otherwise."""
    config, arch = model.config, model.arch
    problem = None
    act = config.get("hidden_activation") or config.get("hidden_act")
    if act not in ("gelu_pytorch_tanh",) if arch.gemma else act not in ("silu", "swish"):
        problem = f"its activation {act!r}"
    elif arch.gemma and list(config["layer_types"]) != _gemma_layers(model.layers):
        problem = "its order of sliding-window layers"
    elif arch.model_type in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        problem = "its sliding window"
    elif arch.experts == "mlp" and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        problem = "its dense layers among sparse ones"
    elif arch.experts == "mlp" and bool(config.get("norm_topk_prob")) == arch.shared_expert:
        problem = f"norm_topk_prob {config.get('norm_topk_prob')}"
    if problem:
        raise QkitError(
            f"{arch.architecture}: llama.cpp does not compute {problem} as this model does",
            "use format compressed-tensors or gptq",
        )


def _gemma_layers(layers: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % _GEMMA_PATTERN else "full_attention" for i in range(layers)]


def rope(model: Model) -> Mapping[str, Any]:
    """transformers' parameters of the rotation; of Gemma those of the layers that attend to everything."""
    found = model.config.get("rope_parameters") or {}
    return found.get("full_attention", found)


def rope_factors(model: Model) -> list[float] | None:
    """What each inverse frequency is divided by, where that is Llama 3's scaling; None elsewhere."""
    given = rope(model)
    if given.get("rope_type") != "llama3":
        return None
    return llama3_factors(float(given["rope_theta"]), model.config["head_dim"], dict(given))


def hyperparameters(model: Model) -> dict[str, str | Typed]:
    """The keys under `{architecture}.`, in the order in which they are written."""
    config, arch = model.config, model.arch
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    given = rope(model)
    values["rope.freq_base"] = float(given.get("rope_theta", 10000.0))
    values |= _scaling(given, arch)
    if config.get("sliding_window") and (arch.gemma or arch.model_type in ("mistral", "mixtral")):
        values["attention.sliding_window"] = config["sliding_window"]
    if arch.gemma:
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if float(local.get("rope_theta", 10000.0)) != 10000.0:
            values["rope.freq_base_swa"] = float(local["rope_theta"])
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key):
                values[key] = float(config[key])
    if arch.experts:
        values["expert_count"] = config["num_experts"]
        values["expert_used_count"] = config["num_experts_per_tok"]
        if arch.model_type != "mixtral":
            values["expert_feed_forward_length"] = config["moe_intermediate_size"]
        if arch.shared_expert:
            values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return {f"{model.name}.{key}": _typed(value) for key, value in values.items()}


def _scaling(given: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    kind = given.get("rope_type", "default")
    if kind in ("default", "llama3"):  # the latter is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(given["factor"])}
    if kind == "yarn":
        values = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(given["factor"]),
            "rope.scaling.original_context_length": int(given["original_max_position_embeddings"]),
        }
        for key, ours in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if given.get(key) is not None:
                values[f"rope.scaling.{ours}"] = float(given[key])
        if given.get("attention_factor") is None and given.get("mscale") is None:
            return values
    raise QkitError(
        f"{arch.architecture}: RoPE scaling of type {kind!r} with {dict(given)} is not written to GGUF files",
        "written: linear, llama3, yarn with its usual attention factor",
    )


def _typed(value: Any) -> str | Typed:
    if isinstance(value, str):
        return value
    return Typed("f32" if isinstance(value, float) else "u32", value)
