"""Decoding steps of a loaded model in one call of the C++ library instead of hundreds of operations from Python.

`attach(model)` gives the model a forward that takes this path for a single new token per sequence over a
transformers DynamicCache, without gradients and without outputs nobody needs, and the model's own forward for
everything else. Results are those of the model up to rounding: activations are bfloat16 between linears either way.
"""

from __future__ import annotations

import functools
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from ..models.cache_name import cache_name, name_in
from .growing_cache import apart, grow, new
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
_FIRST_POSITIONS = 1024
_KNOWN = {"cache_position", "return_dict", "output_attentions", "output_hidden_states", "token_type_ids"}
_MAX_BATCH = 16  # above it prefill's matmuls and torch's attention do as well


def attach(model: Any) -> str | None:
    """Gives `model` the fast decoding step; returns None, or why it keeps its own (logged nowhere: it still works).

    The model becomes an instance of a subclass of its class. A copy or a pickle of it is of the class it had, and runs
    its own weights by its own forward; `detach` turns it back."""
    reason = _unsupported(model)
    if reason is None:
        model.__dict__["_qkit_runner"] = _Runner()
        model.__class__ = _fast_class(type(model))  # type: ignore[arg-type]
    return reason


def detach(model: Any) -> None:
    """Takes the fast decoding step away again; does nothing to a model without one."""
    if model.__dict__.pop("_qkit_runner", None) is not None:
        model.__class__ = type(model).__mro__[1]


@functools.cache
def _fast_class(base: type) -> type:
    """`base` with a forward that tries the fast step first."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self.__dict__.get("_qkit_runner")
        output = None if args or runner is None else runner.step(self, kwargs)
        return base.forward(self, *args, **kwargs) if output is None else output  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "_qkit_runner"}
        return new, (base,), state

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def _unsupported(model: Any) -> str | None:
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
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        return f"activation {activation!r}"
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            return name
    for parameters in _rope_parameters(config).values():
        if parameters.get("rope_type", "default") not in _ROPE_TYPES or parameters.get("partial_rotary_factor", 1) != 1:
            return f"rotary embedding {parameters}"
    try:
        _linears(model)
        _norms(model)
        _own(model.get_input_embeddings().weight)
    except (AttributeError, TypeError) as error:
        return str(error)
    return None


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


def _linears(model: Any) -> list[Linear]:
    found = [_linear(model.lm_head)]
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        found += map(_linear, (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj))
    return found


class _Watch:
    """A model's modules and tensors as they are now, to be compared before every step: by the dicts that hold them, so
    that hundreds of modules take a fraction of a millisecond."""

    def __init__(self, model: Any):
        import torch

        every = [module.__dict__ for module in model.modules()]
        # Without the model's own, which holds this: it would outlive its last reference. Its hooks run anyway.
        self.own = every[1:]
        self.hooks = [own[name] for own in self.own for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.children = [own["_modules"] for own in every]
        self.tensors = [own[name] for own in every for name in ("_parameters", "_buffers")]
        # References: what is replaced must not be freed, or its successor could have its id.
        self.seen = self._members()
        self.held = [member for member in self.seen if isinstance(member, torch.Tensor)]
        self.state = self._versions()

    def _members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, (*self.children, *self.tensors)))]

    def _versions(self) -> list[int] | None:
        try:
            return [*(t._version for t in self.held), *(t.data_ptr() for t in self.held)]
        except RuntimeError:  # tensors made in inference mode count no versions
            return None

    def unhooked(self) -> bool:
        """Whether nothing would be passed over by the fast step: hooks, and forwards that somebody assigned."""
        from torch.nn.modules import module as nn_module

        everywhere = nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        return not everywhere and not any(self.hooks) and not any("forward" in own for own in self.own)

    def same(self) -> bool:
        """Whether no module and no tensor was replaced, and no tensor changed in place."""
        members = self._members()
        if len(members) != len(self.seen) or not all(map(is_, members, self.seen)):
            return False
        # A module's own dicts may be replaced as a whole, as `__setstate__` does.
        found = [own[name] for own in self.own for name in ("_forward_hooks", "_forward_pre_hooks")]
        return all(map(is_, found, self.hooks)) and self.state is not None and self._versions() == self.state


def _own_classes(model: Any) -> bool:
    """Whether every module is transformers', torch's or ours: an adapter's stand-in computes something else."""
    known = ("transformers.", "torch.nn.", "qkit.")
    return all(type(module).__module__.startswith(known) for module in model.modules())


def _build(model: Any, positions: int) -> Decoder:
    import torch

    from ..kernels.cpu.decoder import Decoder, Layer

    config, inner = model.config, model.model
    linears = iter(_linears(model))
    head = next(linears)
    *norms, last = _norms(model)
    kinds = _kinds(config)
    tables = {kind: _rotary(inner.rotary_emb, kind, positions) for kind in set(kinds)}
    layers = []
    for i in range(len(inner.layers)):
        cosine, sine = tables[kinds[i]]
        own = [next(linears) for _ in range(7)]
        layers.append(Layer(*own, **norms[i], cosine=cosine, sine=sine, window=_window(config, i) or 0))  # type: ignore[arg-type]
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
        epsilon=config.rms_norm_eps,
        norm_offset=1.0 if config.model_type in _GEMMA else 0.0,
        activation=_ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
    )


def _window(config: Any, layer: int) -> int | None:
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


class _Runner:
    """What the fast step keeps between steps. It holds the model's tensors, not the model."""

    def __init__(self) -> None:
        self.decoder: Decoder | None = None
        self.watch: _Watch | None = None
        self.fits = False
        self.positions = 0

    def _ready(self, model: Any, positions: int) -> bool:
        """Whether the C structures describe the model as it is now, for that many positions."""
        same = self.watch is not None and self.watch.same()
        watch = self.watch if same and self.watch is not None else _Watch(model)
        if not watch.unhooked() or watch.state is None:
            return False
        if not same or (self.fits and positions > self.positions):
            self.decoder = None
            self.fits = _own_classes(model) and _unsupported(model) is None
            if self.fits:
                self.positions = max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length())
                self.decoder = _build(model, self.positions)
            self.watch = _Watch(model)  # packing a weight for its kernel replaces its buffers
        return self.fits

    def step(self, model: Any, given: dict[str, Any]) -> Any:
        """The model's output for one new token a sequence, or None where the model's own forward is needed."""
        import torch
        from transformers import DynamicCache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        from ..kernels.cpu.decoder import decode

        name = name_in(given, model.forward)
        ids, cache = given.get("input_ids"), given.get(name)
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or type(cache) is not DynamicCache:
            return None
        if torch.is_grad_enabled() or model.training or ids.shape[0] > _MAX_BATCH:
            return None
        rest = given.keys() - {"input_ids", name, "attention_mask", "position_ids", "logits_to_keep"}
        if any(given[k] is not None for k in rest - _KNOWN - {"use_cache"}) or given.get("use_cache") is False:
            return None
        config = model.config
        if given.get("output_attentions") or given.get("output_hidden_states") or given.get("return_dict") is False:
            return None
        if config.output_attentions or config.output_hidden_states or config.return_dict is False:
            return None
        if any(apart(layer) for layer in cache.layers):
            return None  # somebody assigned keys or values (beam search, a crop): the cache is on its own from there
        length = cache.get_seq_length()
        layers: list[Any] = cache.layers
        if length == 0 or len(layers) != config.num_hidden_layers or getattr(layers[0], "record_past", False):
            return None
        batch = ids.shape[0]
        first = _first(given.get("attention_mask"), batch, length + 1)
        if first is None:
            return None
        position_ids = given.get("position_ids")
        positions = torch.full((batch,), length) if position_ids is None else position_ids.reshape(-1).long()
        if positions.numel() != batch or layers[0].keys.shape[0] != batch or layers[0].keys.dtype != torch.bfloat16:
            return None
        if not self._ready(model, int(positions.max()) + 1):
            return None
        assert self.decoder is not None
        store = grow(cache, length)
        tokens = ids.reshape(-1).long().contiguous()
        logits = decode(self.decoder, store.cache, length, tokens, positions.contiguous(), first)
        store.length += 1
        held: dict[str, Any] = {cache_name(): cache}
        return CausalLMOutputWithPast(logits=logits[:, None], **held)


def _first(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The first entry each sequence sees, int64 [batch]; None for a mask that is not padding on the left."""
    import torch

    if mask is not None and not isinstance(mask, torch.Tensor):  # a mask for each kind of layer
        return None
    if mask is None or (mask.dim() == 2 and mask.shape == (batch, length) and bool(mask.all())):
        return torch.zeros(batch, dtype=torch.int64)
    if mask.dim() != 2 or mask.shape != (batch, length):
        return None
    seen = mask != 0
    if not bool((seen[:, 1:] >= seen[:, :-1]).all()) or not bool(seen[:, -1].all()):
        return None
    return (~seen).sum(1)
