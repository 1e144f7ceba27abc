"""A transformers DynamicCache whose keys and values lie in buffers with room to grow, for the fast decoding step.

The cache and its layers stay what they were to everyone else: views of the buffers, and ordinary tensors from the
moment that somebody assigns them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..kernels.cpu.decoder import Cache

HEADROOM = 256  # tokens a cache has room for when it is first copied; it doubles when they are used up


def new(base: type) -> Any:
    """An empty instance, for copies and pickles that are of a class which can be found by its name."""
    return object.__new__(base)


class Buffers:
    """Keys and values of every layer, with room to grow: entries [0, length), of a sliding layer only the last."""

    def __init__(self, layers: list[Any], length: int, capacity: int):
        import torch

        from ..kernels.cpu.decoder import Cache

        self.length, self.capacity = length, capacity
        both = []
        for name in ("keys", "values"):
            grown = []
            for layer in layers:
                old = getattr(layer, name)
                new = torch.empty(*old.shape[:2], capacity, old.shape[3], dtype=torch.bfloat16)
                new[:, :, length - old.shape[2] : length] = old
                grown.append(new)
            both.append(tuple(grown))
        self.cache: Cache = Cache.of(*both)


def apart(layer: Any) -> bool:
    """Whether a grown layer's keys or values were assigned since: its store no longer is the cache."""
    return "store" in layer.__dict__ and bool({"_plain_keys", "_plain_values"} & layer.__dict__.keys())


@functools.cache
def _grown_class(base: type) -> type:
    """`base` (a DynamicLayer) whose keys and values are views of a `Buffers` until something assigns them."""

    def view(name: str) -> property:
        plain = f"_plain_{name}"

        def get(self: Any) -> Any:
            store = self.__dict__.get("store")
            if plain in self.__dict__ or store is None:
                return self.__dict__.get(plain)
            window = getattr(self, "sliding_window", None)
            begin = max(0, store.length - window + 1) if window else 0
            return getattr(store.cache, name)[self.index][:, :, begin : store.length]

        def put(self: Any, value: Any) -> None:
            if self.__dict__.get("store") is not None and not apart(self):
                self.__dict__["_cumulative"] = self.store.length  # what the store stops counting here
            self.__dict__[plain] = value

        return property(get, put)

    def cumulative(self: Any) -> int:
        store = self.__dict__.get("store")
        return self.__dict__["_cumulative"] if store is None or "_plain_keys" in self.__dict__ else store.length

    def set_cumulative(self: Any, value: int) -> None:
        # update() counts new entries before it assigns the keys: from then on the layer is on its own
        if self.__dict__.get("store") is not None and "_plain_keys" not in self.__dict__:
            keys, values = self.keys, self.values
            self.__dict__["_plain_keys"], self.__dict__["_plain_values"] = keys, values
        self.__dict__["_cumulative"] = value

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy or a pickle is an ordinary layer with tensors of its own."""
        held = ("store", "index", "_cumulative", "_plain_keys", "_plain_values")
        state = {k: v for k, v in self.__dict__.items() if k not in held}
        state |= {name: getattr(self, name).clone() for name in ("keys", "values")}
        if sliding:
            state["cumulative_length"] = self.cumulative_length
        return new, (base,), state

    sliding = hasattr(base, "sliding_window") or "Sliding" in base.__name__
    members: dict[str, Any] = {"keys": view("keys"), "values": view("values"), "__reduce_ex__": reduce}
    if sliding:
        members["cumulative_length"] = property(cumulative, set_cumulative)
    return type(f"Grown{base.__name__}", (base,), members)


def grow(cache: Any, length: int) -> Buffers:
    """The cache's store, made or enlarged so that one more entry fits. The cache stays a cache of its own type; none of
    its layers is `apart`."""
    layers = cache.layers
    store: Buffers | None = getattr(layers[0], "store", None)
    kept = all(getattr(layer, "store", None) is store for layer in layers)
    if store is not None and kept and store.length == length < store.capacity:
        return store
    capacity = max(length + HEADROOM, 2 * length if store is not None else 0)
    fresh = Buffers(layers, length, capacity)
    for i, layer in enumerate(layers):
        base = type(layer) if not type(layer).__name__.startswith("Grown") else type(layer).__mro__[1]
        state = {k: v for k, v in layer.__dict__.items() if k not in ("keys", "values")}
        if "cumulative_length" in state:
            state["_cumulative"] = state.pop("cumulative_length")
        grown: Any = object.__new__(_grown_class(base))
        grown.__dict__.update(state, store=fresh, index=i)
        layers[i] = grown
    return fresh
