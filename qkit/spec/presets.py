"""The schemes that users name."""

from __future__ import annotations

from ..errors import QkitError
from .layer import LayerSpec, integer

AUTO_GROUP_SIZES = (128, 64, 32)

# None: keep the source's values (an export, with a GGUF source dequantized).
PRESETS: dict[str, LayerSpec | None] = {
    "w4a16": integer(4),
    "w4a16-asym": integer(4, symmetric=False),
    "w8a16": integer(8),
    "w8a16-asym": integer(8, symmetric=False),
    "none": None,
}


def preset(name: str) -> LayerSpec | None:
    """The scheme a user named; raises QkitError listing the known ones."""
    key = name.lower().replace("_", "-")
    if key not in PRESETS:
        raise QkitError(f"unknown scheme {name!r}", "known schemes: " + ", ".join(PRESETS))
    return PRESETS[key]
