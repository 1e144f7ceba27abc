"""What goes into a model's KV cache: seen, or rounded to FP8 as engines do that keep it in 8 bits.

Attention hands keys (after norm and rotation) and values to `update` of its cache argument and computes with what that
gives back. A stand-in for the argument, put there by a hook, is so the one place for every architecture, with a cache
and without, and whatever computes attention; compressed-tensors does the same (modeling/kvcache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import QkitError
from ..spec.dtypes import E4M3_MAX
from .cache_name import name_in
from .experts import decoder_of
from .families import KV_SCALES

# (attention, keys, values), both [batch, heads, tokens, head_dim] -> what takes the place of the two
Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attentions(model: Any) -> dict[str, nn.Module]:
    """Name -> attention module of each decoder block. Raises QkitError where there are none."""
    inside = {id(module) for module in decoder_of(model).modules()}
    found = {n: m for n, m in model.named_modules() if n.endswith("self_attn") and id(m) in inside}
    if not found:
        raise QkitError(f"{type(model).__name__} has no attention whose KV cache could be rounded")
    return found


def intercept(attention: nn.Module, change: Change) -> Any:
    """Let keys and values go through change(attention, keys, values) on their way into the cache or, without a cache,
    into attention. Returns a handle whose `remove` ends it."""
    return attention.register_forward_pre_hook(_Hook(change), with_kwargs=True)


class _Hook:
    """Of a class, not a function's inner one, so that models can be pickled."""

    def __init__(self, change: Change):
        self.change = change

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_in(kwargs, attention.forward)
        stand_in = _StandIn(kwargs.get(name), partial(self.change, attention))
        return args, {**kwargs, name: stand_in}


class _StandIn:
    """Of a transformers cache (or None), for one call of one attention module."""

    def __init__(self, cache: Any, change: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self.cache, self.change = cache, change

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.change(keys, values)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def add_rounding(model: Any) -> None:
    """Round keys and values by scales that the checkpoint is to fill: buffers on meta, shape [1]."""
    for attention in attentions(model).values():
        for name in KV_SCALES:
            attention.register_buffer(name, torch.empty(1, device="meta"))
        intercept(attention, _by_scales)


def remove_rounding(model: Any) -> None:
    """Undo `add_rounding`; does nothing to a model without it."""
    for module in model.modules():
        for local in KV_SCALES:
            module._buffers.pop(local, None)
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def _by_scales(attention: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k_scale, v_scale = (getattr(attention, name) for name in KV_SCALES)
    return _Rounded.apply(keys, k_scale), _Rounded.apply(values, v_scale)  # type: ignore[no-untyped-call]


def is_rounded(model: Any) -> bool:
    """Whether `add_rounding` was applied."""
    return any(KV_SCALES[0] in module._buffers for module in model.modules())


def check_scales(model: Any, prefix: str = "") -> None:
    """Raises QkitError for a scale that is no positive number, of the attentions whose names begin with `prefix`."""
    for name, attention in attentions(model).items():
        if not name.startswith(prefix):
            continue
        for local in KV_SCALES:
            scale = getattr(attention, local)
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise QkitError(f"{name}.{local} is {scale.tolist()}, not a positive number", "the folder is damaged")


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest of scale times the values of e4m3, the largest of which stands for whatever is beyond it."""
    wide = scale.float()
    codes = (x.float() / wide).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * wide).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """`rounded`, whose gradient is that of the value as it was: an adapter can be trained through it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rounded(x, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None
