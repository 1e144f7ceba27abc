"""What a model is made of, to be compared before every step, so that nothing somebody changes is passed over."""

from __future__ import annotations

import copy
from itertools import chain
from operator import is_
from typing import Any

_PLAIN = (bool, int, float, str, type(None))


class Watch:
    """A model as it was: its modules and their classes, its tensors by identity, address and version, hooks and
    assigned forwards, the settings of some modules, the config. By the dicts that hold them, so that hundreds of
    modules take a fraction of a millisecond. It does not hold the model."""

    def __init__(self, model: Any, settings_of: list[Any], copied: list[Any]):
        """settings_of: modules whose numbers count; copied: tensors whose values do, whoever writes them."""
        import torch

        modules = list(model.modules())
        # Without the model's own dict, which holds this: it would outlive its last reference. Its hooks run anyway.
        self._modules = modules[1:]
        self._own = [module.__dict__ for module in self._modules]
        self._children = [module.__dict__["_modules"] for module in modules]
        self._tensors = [module.__dict__[name] for module in modules for name in ("_parameters", "_buffers")]
        self._classes: list[Any] = list(map(type, self._modules))
        self._forwards = {kind: kind.forward for kind in self._classes}
        self._hooks = self._hook_dicts()
        # References: what is replaced must not be freed, or its successor could have its id.
        self._members = self._all_members()
        self._held = [member for member in self._members if isinstance(member, torch.Tensor)]
        self._state = self._versions()
        self._settings = [
            (own, [key for key, value in own.items() if key[0] != "_" and isinstance(value, _PLAIN)])
            for own in (module.__dict__ for module in settings_of)
        ]
        self._values = self._all_settings()
        self._copied = [(tensor, tensor.clone()) for tensor in copied]
        self._config, self._said = model.config, _said(model.config)
        self.hooked = self._is_hooked()

    @property
    def complete(self) -> bool:
        """Whether every change will be seen: tensors made in inference mode count no versions."""
        return self._state is not None

    def same(self, model: Any) -> bool:
        """Whether the model is what it was."""
        import torch

        members = self._all_members()
        return (
            len(members) == len(self._members)
            and all(map(is_, members, self._members))
            # A module's own dicts may be replaced as a whole, as `__setstate__` does.
            and all(map(is_, self._hook_dicts(), self._hooks))
            and list(map(type, self._modules)) == self._classes
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and self._is_hooked() == self.hooked
            and self._versions() == self._state
            and self._all_settings() == self._values
            and all(torch.equal(tensor, value) for tensor, value in self._copied)
            and model.config is self._config
            and vars(self._config) == self._said
        )

    def _hook_dicts(self) -> list[Any]:
        return [own[name] for own in self._own for name in ("_forward_hooks", "_forward_pre_hooks")]

    def _is_hooked(self) -> bool:
        """Whether there are hooks, or forwards that somebody assigned."""
        from torch.nn.modules import module as nn_module

        everywhere = nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        return bool(everywhere) or any(self._hooks) or any("forward" in own for own in self._own)

    def _all_members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, (*self._children, *self._tensors)))]

    def _versions(self) -> list[int] | None:
        try:
            return [*(t._version for t in self._held), *(t.data_ptr() for t in self._held)]
        except RuntimeError:
            return None

    def _all_settings(self) -> list[Any]:
        return [own.get(key) for own, keys in self._settings for key in keys]


def _said(config: Any) -> dict[str, Any]:
    """What a config says. Its other values, of which some are equal to nothing, are those that they were."""
    nested = {k: copy.deepcopy(v) for k, v in vars(config).items() if isinstance(v, (dict, list))}
    return vars(config) | nested
