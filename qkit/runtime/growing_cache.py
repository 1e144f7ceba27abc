"""A transformers DynamicCache whose keys and values lie in buffers with room to grow, for prompts and steps in C++.

To everyone else the cache and its layers stay what they are: keys and values are views of the buffers, and a layer of
which anything is assigned is an ordinary one from then on. Buffers that are full or whose entries are moved are
replaced, not written over: whoever holds a view of one keeps what they saw.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..kernels.cpu.decoder import Cache

HEADROOM = 256  # slots beyond the entries: at least so many of a full layer, which doubles, and of a sliding one always
_HELD = ("keys", "values", "cumulative_length")


def new(base: type) -> Any:
    """An empty instance, for copies and pickles that are of a class which can be found by its name."""
    return object.__new__(base)


@dataclass(frozen=True)
class Kind:
    """What the step needs of a cache: the window of each layer, 0 for all; sequences, key-value heads, their size."""

    windows: tuple[int, ...]
    batch: int
    heads: int
    dim: int


@dataclass(eq=False)
class Store:
    """Keys and values of a cache's layers: entries [starts[i], length) of layer i at the front of its buffers."""

    kind: Kind
    length: int
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)  # of the cache's layers: 0 for one that keeps everything
    room: int = 0  # the length at which a buffer is full
    cache: Cache | None = None

    def view(self, i: int, name: str) -> torch.Tensor:
        """What a layer of its class would hold: of a window all but one, since the next query brings its own."""
        begin = max(0, self.length - self.windows[i] + 1) if self.windows[i] else 0
        buffer: torch.Tensor = getattr(self, name)[i]
        return buffer[:, :, begin - self.starts[i] : self.length - self.starts[i]]

    def take(self, layer: Any, more: int) -> None:
        """Copies the next layer's entries, with slots as `make_room` has them; the layer is a view of them from then
        on."""
        import torch

        base, i = _base(layer), len(self.keys)
        window = getattr(layer, "sliding_window", 0)
        if not layer.is_initialized:
            nothing = torch.empty(self.kind.batch, self.kind.heads, 0, self.kind.dim, dtype=torch.bfloat16)
            layer.lazy_initialization(nothing, nothing)
            layer.keys = layer.values = nothing
        spare = HEADROOM if window else HEADROOM + more - 1
        keys, values = (_roomy(getattr(layer, name), spare) for name in ("keys", "values"))
        self.keys.append(keys)
        self.values.append(values)
        self.windows.append(window)
        self.starts.append(max(0, self.length - window + 1) if window else 0)
        for name in _HELD:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(_store=self, _index=i)
        object.__setattr__(layer, "__class__", _grown_class(base))

    def make_room(self, more: int = 1) -> None:
        """Buffers with a slot for `more` entries, at most `HEADROOM` of them in sliding layers, of which a new buffer
        leaves behind what no query sees again."""
        for i, window in enumerate(self.windows):
            if self.starts[i] + self.keys[i].shape[2] >= self.length + (min(more, HEADROOM) if window else more):
                continue
            spare = HEADROOM if window else max(HEADROOM, self.length) + more
            self.keys[i], self.values[i] = (_roomy(self.view(i, name), spare) for name in ("keys", "values"))
            self.starts[i] = max(0, self.length - window + 1) if window else 0
        self.settle()

    def clear(self, sequence: int, n: int) -> None:
        """Zeros for the next n entries of a sequence."""
        for start, keys, values in zip(self.starts, self.keys, self.values, strict=True):
            here = slice(self.length - start, self.length - start + n)
            keys[sequence, :, here] = 0
            values[sequence, :, here] = 0

    def settle(self) -> None:
        from ..kernels.cpu.decoder import Cache

        self.room = min(start + keys.shape[2] for start, keys in zip(self.starts, self.keys, strict=True))
        self.cache = Cache.of(tuple(self.keys), tuple(self.values), tuple(self.starts))


def _roomy(entries: torch.Tensor, more: int) -> torch.Tensor:
    """A copy of [batch, heads, entries, dim] with so many slots more."""
    import torch

    batch, heads, held, dim = entries.shape
    buffer = torch.empty(batch, heads, held + more, dim, dtype=entries.dtype)
    buffer[:, :, :held] = entries
    return buffer


def store_of(layers: list[Any], length: int, kind: Kind, more: int = 1) -> Store | None:
    """The store in which these layers lie, with room for `more` entries (see `Store.make_room`), made where they do not
    lie in one together.

    None where they hold something else than the `length` entries that the step would add to."""
    store: Store | None = layers[0].__dict__.get("_store")
    if store is None or store.kind != kind or not all(_lies_in(store, i, layer) for i, layer in enumerate(layers)):
        if not all(map(functools.partial(_holds, length, kind), layers, kind.windows)):
            return None
        store = Store(kind, length)
        for layer in layers:
            store.take(layer, more)
        store.settle()
    if length + more > store.room:
        store.make_room(more)
    return store


def _lies_in(store: Store, i: int, layer: Any) -> bool:
    own = layer.__dict__
    return own.get("_store") is store and own["_index"] == i


def _holds(length: int, kind: Kind, layer: Any, window: int) -> bool:
    import torch
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    base, held = _base(layer), length
    if base is DynamicSlidingWindowLayer:
        if layer.sliding_window != window or layer.cumulative_length != length or getattr(layer, "record_past", False):
            return False
        held = min(length, window - 1)
    elif base is not DynamicLayer:
        return False
    if not layer.is_initialized:
        return length == 0
    shape = (kind.batch, kind.heads, held, kind.dim)
    both = (layer.keys, layer.values)
    return all(
        isinstance(t, torch.Tensor) and t.shape == shape and t.dtype == torch.bfloat16 and t.is_cpu for t in both
    )


def _base(layer: Any) -> type:
    """The class of transformers' that a layer has, or had before it came to lie in a store."""
    return type(layer).__mro__[1] if isinstance(layer, _Grown) else type(layer)


class _Grown:
    """A cache layer that lies in a store. Behind its old class among the bases: so its instances are laid out alike."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name in _HELD and "_store" in own:
            if name != "cumulative_length":
                return own["_store"].view(own["_index"], name)
            if own["_store"].windows[own["_index"]]:
                return own["_store"].length
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever assigns something gets an ordinary layer: what is assigned is not in the store."""
        plain = self._plain()
        self.__dict__.clear()
        self.__dict__.update(plain)
        object.__setattr__(self, "__class__", _base(self))
        setattr(self, name, value)

    def _plain(self) -> dict[str, Any]:
        held = {name: getattr(self, name) for name in _HELD if hasattr(self, name)}
        return {k: v for k, v in self.__dict__.items() if k not in ("_store", "_index")} | held

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle is an ordinary layer with tensors of its own."""
        state = self._plain()
        return new, (_base(self),), state | {name: state[name].clone() for name in ("keys", "values")}


@functools.cache
def _grown_class(base: type) -> type:
    return type(base.__name__, (base, _Grown), {"__module__": base.__module__, "__doc__": base.__doc__})
