"""qkit: quantize open language models, run them, and prove what it cost."""

from __future__ import annotations

__version__ = "0.1.0"

# Light imports only: torch and transformers are imported when these functions are called. The names are bound
# here, at once, because `convert` and `profile` are also the modules they live in.
from .convert import convert
from .errors import QkitError
from .profile import profile
from .runtime import load

__all__ = ["QkitError", "__version__", "convert", "load", "profile"]
