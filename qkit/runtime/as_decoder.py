"""A transformers model as the decoding step takes it, or what speaks against it.

The step stands for the architecture's own modules and nothing else: every one must be of its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .head import Head
from .linear import QuantLinear

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.cpu.decoder import Decoder, Linear

_GEMMA = ("gemma3_text",)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", *_GEMMA)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length so far
_ATTENTIONS = ("eager", "sdpa")  # what a user registers computes something else
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
          "q_norm", "k_norm", "norm")  # fmt: skip
# The last part of a module's name -> how its class is called, without the architecture
_CLASSES = {
    "": "ForCausalLM", "model": "Model", "self_attn": "Attention", "mlp": "MLP", "rotary_emb": "RotaryEmbedding",
    **dict.fromkeys(_NORMS, "RMSNorm"),
}  # fmt: skip
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def unsupported(model: Any) -> str | None:
    """What speaks against the fast step for the model as it is now, or None."""
    import torch

    from ..kernels import backend
    from ..models.kv_cache import is_rounded

    config = model.config
    if backend().startswith("torch"):
        return backend()
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is none of {', '.join(MODEL_TYPES)}"
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return f"runs in bfloat16 on the CPU, not {model.dtype} on {model.device}"
    if is_rounded(model):
        return "keys and values are rounded on their way into the KV cache"
    if _activation(config) not in _ACTIVATIONS:
        return f"activation {_activation(config)!r}"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attention {config._attn_implementation!r}"
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            return name
    for parameters in _rope_parameters(config).values():
        if parameters.get("rope_type", "default") not in _ROPE_TYPES or parameters.get("partial_rotary_factor", 1) != 1:
            return f"rotary embedding {parameters}"
    try:
        linears(model)
        _check_modules(model)
        _check_settings(model)
        _norms(model)
        _own(model.get_input_embeddings().weight)
    except (AttributeError, TypeError) as error:
        return str(error)
    return None


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act  # type: ignore[no-any-return]


def _check_modules(model: Any) -> None:
    """Raises TypeError for a module that is not the architecture's own: a stand-in, an adapter, one too many."""
    from torch import nn
    from transformers.activations import ACT2FN

    home = type(model.model).__module__
    if not home.startswith("transformers.models."):
        raise TypeError(f"a model of {home}")
    activation = type(ACT2FN[_activation(model.config)])
    for name, module in model.named_modules():
        kind: Any = type(module)
        last = name.rpartition(".")[2]
        own = kind.__module__ == home
        if kind is not nn.ModuleList and kind.forward.__module__ != kind.__module__:
            raise TypeError(f"{name} has another forward than its class was written with")
        if last in _LINEARS:  # `linears` has looked at them
            continue
        if last == "embed_tokens":
            right = kind is nn.Embedding or (own and kind.__name__.endswith("ScaledWordEmbedding"))
        elif last == "layers":
            right = kind is nn.ModuleList
        elif last == "act_fn":
            right = kind is activation
        else:
            suffix = "DecoderLayer" if last.isdecimal() else _CLASSES.get(last)
            right = own and suffix is not None and kind.__name__.endswith(suffix)
        if not right:
            raise TypeError(f"{name} is a {kind.__name__}")


def _check_settings(model: Any) -> None:
    """Raises TypeError where modules differ in what the step has once for all, or where it has no such setting."""
    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    _one((a.scaling for a in attentions), "scales of attention")
    _one((a.head_dim for a in attentions), "sizes of a head")
    _one(map(_epsilon, _norm_modules(model)), "epsilons of norms")
    if [a.layer_idx for a in attentions] != list(range(model.config.num_hidden_layers)):
        raise TypeError("layers are not in their order")
    if any(a.training for a in attentions):
        raise TypeError("attention is being trained")
    if model.get_input_embeddings().max_norm is not None:
        raise TypeError("the embedding is renormalized")
    if any(window(model.config, i) == 1 for i in range(len(layers))):
        raise TypeError("a window of one")


def _one(values: Iterable[float], what: str) -> float:
    found = set(values)
    if len(found) != 1:
        raise TypeError(f"{what} of {sorted(found)}")
    return found.pop()


def _norm_modules(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in _NORMS]


def _epsilon(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # type: ignore[no-any-return]


def _rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """Per layer type; "" where all layers share one."""
    given = config.rope_parameters or {}
    nested = {k: v for k, v in given.items() if isinstance(v, dict)}
    return nested or {"": given}


def _kinds(config: Any) -> list[str]:
    """Each layer's key in `_rope_parameters`."""
    return [""] * config.num_hidden_layers if "" in _rope_parameters(config) else list(config.layer_types)


def _linear(module: nn.Module) -> Linear:
    """Raises TypeError for a module that is neither a packed nor a plain linear (an adapter, a hooked one)."""
    import torch
    from torch import nn

    from ..kernels.cpu.decoder import Linear
    from ..kernels.cpu.matmul import CpuWeight

    if type(module) is QuantLinear:
        _, state = module._prepared(torch.bfloat16)
        if not isinstance(state, CpuWeight):
            raise TypeError("a linear is not on the C++ kernels")
        return Linear(state, None if module.bias is None else _own(module.bias))
    if not (type(module) is nn.Linear or type(module) is Head) or module.weight.dtype != torch.bfloat16:
        raise TypeError(f"a linear is a {type(module).__name__}")
    return Linear(_own(module.weight), None if module.bias is None else _own(module.bias))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The model's own memory, so that whatever is written to it counts. Raises TypeError where it is laid out otherwise
    than the step reads it."""
    import torch

    if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
        raise TypeError(f"a {tensor.dtype} tensor of strides {tensor.stride()}")
    return tensor.detach()


def _norms(model: Any) -> list[dict[str, torch.Tensor | None]]:
    """The norms of each layer, by their names in `Layer`, and at the end {"final": ...}."""

    def weight(module: Any) -> torch.Tensor | None:
        return None if module is None else _own(module.weight)

    gemma = model.config.model_type in _GEMMA
    found = []
    for layer in model.model.layers:
        a = layer.self_attn
        found.append(
            {
                "attention_norm": weight(layer.input_layernorm),
                "attention_post_norm": weight(layer.post_attention_layernorm) if gemma else None,
                "mlp_norm": weight(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm),
                "mlp_post_norm": weight(layer.post_feedforward_layernorm) if gemma else None,
                "q_norm": weight(getattr(a, "q_norm", None)),
                "k_norm": weight(getattr(a, "k_norm", None)),
            }
        )
    return [*found, {"final": weight(model.model.norm)}]


def linears(model: Any) -> list[Linear]:
    """The head, and of each layer q, k, v, o, gate, up and down."""
    found = [_linear(model.lm_head)]
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        found += map(_linear, (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj))
    return found


def build(model: Any, positions: int) -> Decoder:
    """The model, of which `unsupported` says nothing, for positions below `positions`."""
    import torch

    from ..kernels.cpu.decoder import Decoder, Layer

    config, inner = model.config, model.model
    each = iter(linears(model))
    head = next(each)
    *norms, last = _norms(model)
    kinds = _kinds(config)
    tables = {kind: _rotary(inner.rotary_emb, kind, positions) for kind in set(kinds)}
    layers = []
    for i in range(len(inner.layers)):
        cosine, sine = tables[kinds[i]]
        own = [next(each) for _ in range(7)]
        layers.append(Layer(*own, **norms[i], cosine=cosine, sine=sine, window=window(config, i) or 0))  # type: ignore[arg-type]
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    final = last["final"]
    assert final is not None
    first = inner.layers[0]
    return Decoder(
        layers=tuple(layers),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.self_attn.head_dim,
        embedding=_own(embedding.weight),
        final_norm=final,
        head=head,
        embedding_scale=1.0 if scale is None else float(scale.to(torch.bfloat16)),
        attention_scale=first.self_attn.scaling,
        epsilon=_epsilon(inner.norm),
        norm_offset=1.0 if config.model_type in _GEMMA else 0.0,
        activation=_ACTIVATIONS[_activation(config)],
    )


def copied(model: Any) -> list[torch.Tensor]:
    """The small tensors that `build` reads once: writes to them must be looked for."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return [*model.model.rotary_emb.buffers(), *([] if scale is None else [scale])]


def settings_of(model: Any) -> list[Any]:
    """The modules whose attributes `build` reads."""
    attentions = [layer.self_attn for layer in model.model.layers]
    return [model.get_input_embeddings(), model.model.rotary_emb, *attentions, *_norm_modules(model)]


def window(config: Any, layer: int) -> int | None:
    """Positions a query of this layer sees, or None for all."""
    if getattr(config, "layer_types", None):
        return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def _rotary(module: Any, kind: str, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [positions, head_dim / 2]: the model's own tables, before they are rounded to its type."""
    import torch

    ids = torch.arange(positions)[None]
    like = torch.zeros(1)
    with torch.no_grad():
        cosine, sine = module(like, ids, kind) if kind else module(like, ids)
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()
