"""Prompts and decoding steps of a loaded model in calls of the C++ library instead of hundreds of operations.

`attach(model)` gives the model a forward that takes this path for one new token per sequence, or for a prompt of which
the last token's logits are asked for, over a transformers DynamicCache, without gradients and without outputs nobody
needs, and the model's own forward for everything else. Results are those of the model up to rounding: activations are
bfloat16 between linears either way.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models.cache_name import cache_name, name_in
from .as_decoder import build, copied, settings_of, unsupported
from .growing_cache import Kind, Store, new, store_of
from .watch import Watch

if TYPE_CHECKING:
    import torch

    from ..kernels.cpu.decoder import Decoder

_MORE_POSITIONS = 1024  # of the rotary tables, beyond what is asked for: what follows a prompt finds them there
_KNOWN = {"cache_position", "return_dict", "output_attentions", "output_hidden_states", "token_type_ids"}
_MAX_BATCH = 16  # above it prefill's matmuls and torch's attention do as well
_SHORT = 32  # tokens of each of several prompts: below, the model's own forward has them all as one matrix


def attach(model: Any) -> str | None:
    """Gives `model` the fast decoding step; returns None, or why it keeps its own (logged nowhere: it still works).

    The model becomes an instance of a subclass of its class, of the same name. A copy or a pickle of it has a step of
    its own, which runs its own weights; `detach` turns it back."""
    reason = unsupported(model)
    if reason is None and "_qkit_runner" not in model.__dict__:
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
    import torch

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self.__dict__.get("_qkit_runner")
        # What is compiled is the model as it is written.
        if not args and runner is not None and not torch.compiler.is_compiling():
            output = runner.step(self, kwargs)
            if output is not None:
                return output
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "_qkit_runner"}
        return (_with_step if "_qkit_runner" in self.__dict__ else new), (base,), state

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def _with_step(base: type) -> Any:
    """An empty instance of `base` with a step of its own, for copies and pickles."""
    model = new(_fast_class(base))
    model.__dict__["_qkit_runner"] = _Runner()
    return model


@dataclass(frozen=True)
class _Plan:
    """The C structures of a model as `watch` saw it, for so many positions; None where its own forward is to run."""

    watch: Watch
    decoder: Decoder | None
    positions: int

    def holds(self, model: Any, positions: int) -> bool:
        return (self.decoder is None or positions <= self.positions) and self.watch.same(model)


class _Runner:
    """What the fast step keeps between steps. It holds the model's tensors, not the model."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._lock = threading.Lock()

    def _decoder(self, model: Any, positions: int) -> Decoder | None:
        """The model as it is now, or None where the step cannot stand for it. Threads share a plan, replaced whole."""
        plan = self._plan
        if plan is None or not plan.holds(model, positions):
            with self._lock:
                plan = self._plan
                if plan is None or not plan.holds(model, positions):
                    plan = self._plan = _plan(model, positions)
        return plan.decoder

    def step(self, model: Any, given: dict[str, Any]) -> Any:
        """The model's output for the next token of each sequence, or None where its own forward is needed."""
        import torch
        from transformers import DynamicCache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        name = name_in(given, model.forward)
        ids, cache = given.get("input_ids"), given.get(name)
        if ids is None or ids.dim() != 2 or not ids.numel():
            return None
        (batch, n), config = ids.shape, model.config
        if torch.is_grad_enabled() or model.training or batch > _MAX_BATCH or (batch > 1 and 1 < n < _SHORT):
            return None
        if not _only_logits(config, given, name) or (n > 1 and given.get("logits_to_keep", 0) != 1):
            return None
        if cache is None and (given.get("use_cache") or (given.get("use_cache") is None and config.use_cache)):
            cache = DynamicCache(config=config)
        if type(cache) is not DynamicCache:
            return None
        length, layers = cache.get_seq_length(), cache.layers
        if len(layers) != config.num_hidden_layers or cache.offloading:
            return None
        first = _first(given.get("attention_mask"), batch, length + n)
        positions = _positions(given.get("position_ids"), batch, length, n)
        if first is None or positions is None:
            return None
        decoder = self._decoder(model, int(positions.max()) + 1)
        one = n == 1 and length > 0
        if decoder is None or not (one or decoder.takes_prompts):
            return None
        store = store_of(layers, length, Kind(decoder.windows, batch, decoder.kv_heads, decoder.head_dim), n)
        if store is None:
            return None
        logits = (_next if one else _prompt)(decoder, store, ids.long(), positions, first)
        held: dict[str, Any] = {cache_name(): cache}
        return CausalLMOutputWithPast(logits=logits[:, None], **held)


def _next(
    decoder: Decoder, store: Store, ids: torch.Tensor, positions: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Logits [batch, vocabulary] behind one more token of each sequence. ids, positions [batch, 1]; first [batch]."""
    from ..kernels.cpu.decoder import decode

    assert store.cache is not None
    logits = decode(decoder, store.cache, store.length, ids[:, 0].contiguous(), positions[:, 0].contiguous(), first)
    store.length += 1
    return logits


def _prompt(
    decoder: Decoder, store: Store, ids: torch.Tensor, positions: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """The same behind n more. What lies before a sequence's first entry is zero."""
    import torch

    from ..kernels.cpu.decoder import PROMPT, prompt

    batch, n = ids.shape
    seen = first.tolist()
    logits: list[torch.Tensor | None] = [None] * batch
    for begin in range(0, n, PROMPT):
        end, length = min(begin + PROMPT, n), store.length
        if length + end - begin > store.room:
            store.make_room(end - begin)
        assert store.cache is not None
        for b in range(batch):
            padding = min(max(seen[b] - length, 0), end - begin)
            if padding:
                store.clear(b, padding)
            here = b, slice(begin + padding, end)
            if padding < end - begin:
                tokens, places = ids[here].contiguous(), positions[here].contiguous()
                logits[b] = prompt(decoder, store.cache, b, length + padding, tokens, places, seen[b], want=end == n)
        store.length += end - begin
    return torch.stack([row for row in logits if row is not None])


def _plan(model: Any, positions: int) -> _Plan:
    positions = 1 << (positions + _MORE_POSITIONS - 1).bit_length()
    decoder = None
    if unsupported(model) is None:
        watch = Watch(model, settings_of(model), copied(model))
        if watch.complete and not watch.hooked:
            decoder = build(model, positions)
    # Looked at again: packing a weight for its kernel replaces its buffers.
    watch = Watch(model, [], []) if decoder is None else Watch(model, settings_of(model), copied(model))
    return _Plan(watch, decoder, positions)


def _only_logits(config: Any, given: dict[str, Any], name: str) -> bool:
    """Whether all that is given is known here, and nothing is asked for but the logits and the cache."""
    used = {"input_ids", name, "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
    if any(given[key] is not None for key in given.keys() - used - _KNOWN) or given.get("use_cache") is False:
        return False
    if not isinstance(given.get("logits_to_keep", 0), int):  # a tensor of indices
        return False
    for option in ("output_attentions", "output_hidden_states"):
        if given.get(option) or getattr(config, option):
            return False
    return given.get("return_dict") is not False and config.return_dict is not False


def _positions(given: torch.Tensor | None, batch: int, length: int, n: int) -> torch.Tensor | None:
    """Where the rotary tables are read, int64 [batch, n]; None for what is no position a token, near its entry."""
    import torch

    if given is None:
        return torch.arange(length, length + n).expand(batch, n)
    if given.dim() != 2 or given.shape[1] != n or given.shape[0] not in (1, batch):
        return None
    if int(given.min()) < 0 or int(given.max()) > length + n + _MORE_POSITIONS:
        return None
    return given.long().expand(batch, n)


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
