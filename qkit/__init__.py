"""qkit: quantize open language models, run them, and prove what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert
    from .errors import QkitError
    from .profile import profile
    from .runtime import load

__version__ = "0.1.0"
__all__ = ["QkitError", "__version__", "convert", "load", "profile"]

# Public names are imported on first use, so that `import qkit` and `qkit --help` never pay for torch.
_LAZY = {"convert": "qkit.convert", "load": "qkit.runtime", "profile": "qkit.profile", "QkitError": "qkit.errors"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        # `import qkit.convert` binds the module under the function's name: rebind the function.
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qkit' has no attribute {name!r}")
