"""qkit: quantize open language models, run them, and prove what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import transformers_hook

if TYPE_CHECKING:
    from .conversion import convert
    from .errors import QkitError
    from .profiling import profile
    from .runtime.adapters import lora
    from .runtime.load import load
    from .runtime.transformers_quantizer import register_transformers

__version__ = "0.1.0"
__all__ = ["QkitError", "__version__", "convert", "load", "lora", "profile", "register_transformers"]

# Imported on first use: `import qkit` costs nothing, and `qkit --help` answers at once. No module has the name of one
# of these functions, or importing it would put the module in the function's place.
_HOMES = {
    "QkitError": "errors",
    "convert": "conversion",
    "load": "runtime",
    "lora": "runtime.adapters",
    "profile": "profiling",
    "register_transformers": "runtime.transformers_quantizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qkit.{_HOMES[name]}"), name)


transformers_hook.install()
