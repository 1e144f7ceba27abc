"""Memory of tensors, counted: what a call takes at most."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operators make, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), lambda storage: 0)  # what was there before, of which operators make views
        made = func(*args, **(kwargs or {}))
        self.note(made, lambda storage: storage.nbytes())
        self.most = max(self.most, sum(self.alive.values()))
        return made

    def note(self, values: Any, counted: Callable[[torch.UntypedStorage], int]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                at = id(storage)
                if at not in self.alive:
                    self.alive[at] = counted(storage)
                    weakref.finalize(storage, self.alive.pop, at)


def most(call: Any, *args: Any, held: Callable[[], Iterable[Any]] = tuple) -> int:
    """The most bytes that tensors took at once while `call(*args)` ran: those made meanwhile, and what `held` gives,
    until they are let go."""
    gc.collect()
    seen = Allocated()
    seen.note(list(held()), lambda storage: storage.nbytes())
    with seen:
        call(*args)
    return seen.most
