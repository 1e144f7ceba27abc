"""`import qkit` makes transformers load quantized folders, without importing transformers to do so.

transformers has a public table of quantizers but no way to announce one to a process that has not imported it yet,
and importing it takes seconds, which `qkit --help` does not have. So registration waits: a finder on `sys.meta_path`
lets transformers' own module load as ever, registers right afterwards, and is gone.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformers.quantizers.auto"
_log = logging.getLogger("qkit")


class _Waiting:
    """A meta path finder that finds one module the way everybody else does, and registers once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


def install() -> None:
    """Register with transformers now if it is loaded, else when it is. Costs nothing, imports nothing."""
    if hasattr(sys.modules.get(_TABLES), "register_quantizer"):
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]


def _register() -> None:
    """Never in the way of `import transformers`: what goes wrong is said, not raised."""
    try:
        from .runtime import transformers as transformers_quantizer

        # Not there yet while that module is itself what imports transformers; its caller then registers.
        if hasattr(transformers_quantizer, "register_transformers"):
            transformers_quantizer.register_transformers(replace=False)
    except Exception as error:  # transformers' internals may change in any way
        _log.warning("qkit is not registered with transformers: %s: %s", type(error).__name__, error)
