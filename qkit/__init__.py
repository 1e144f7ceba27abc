"""qkit: quantize open language models, run them, and prove what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import transformers_hook

if TYPE_CHECKING:
    from .comparison import compare
    from .conversion.run import convert
    from .errors import QkitError
    from .measure import profile
    from .runtime.load import load
    from .runtime.peft import lora
    from .runtime.transformers import register_transformers

__version__ = "0.1.0"
__all__ = ["QkitError", "__version__", "compare", "convert", "load", "lora", "profile", "register_transformers"]

# Imported on first use: `import qkit` costs nothing, and `qkit --help` answers at once. No module has the name of one
# of these functions, or importing it would put the module in the function's place.
_HOMES = {
    "QkitError": "errors",
    "compare": "comparison",
    "convert": "conversion.run",
    "load": "runtime.load",
    "lora": "runtime.peft",
    "profile": "measure.run",
    "register_transformers": "runtime.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qkit.{_HOMES[name]}"), name)


transformers_hook.install()
