"""The on-disk formats, in the order users see them; the last one is only read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import QkitError
from .awq import AWQ
from .base import Format, FormatReader, as_object, local_names, quantized_modules, read_weight
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .fp8 import BlockFp8
from .gguf import Gguf
from .gptq import GPTQ
from .mxfp4 import Mxfp4
from .plain import Plain

__all__ = [
    "FORMATS", "Format", "FormatReader", "get", "kv_cache", "local_names", "quantized_modules",
    "read_weight", "reader",
]  # fmt: skip

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ("gptq"),
    "gptq_v2": GPTQ("gptq_v2"),
    "awq": AWQ(),
    "bnb": BitsAndBytes(),
    "gguf": Gguf(),
    "mxfp4": Mxfp4(),
    "safetensors": Plain(),
    "fp8": BlockFp8(),
}


def get(name: str) -> Format:
    """The format a user named. Raises QkitError listing the known ones."""
    key = name.lower()
    key = {"compressed_tensors": "compressed-tensors", "gptq-v2": "gptq_v2"}.get(key, key)
    if key not in FORMATS:
        raise QkitError(
            f"unknown format {name!r}", "known formats: " + ", ".join(n for n, f in FORMATS.items() if not f.read_only)
        )
    return FORMATS[key]


def reader(config: Mapping[str, Any]) -> FormatReader | None:
    """How the folder with this config.json stores its quantized modules; None where none is quantized.

    Raises QkitError for a method, or a variant of one, that qkit does not read."""
    given = config.get("quantization_config")
    if given is None:  # where folders of 2023 have it
        given = config.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise QkitError("quantization_config in config.json is not an object")
    try:
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise QkitError("quantization_config in config.json holds a number that is not finite") from None
    given = _as_its_packing(given)
    method = given.get("quant_method")
    if method is None and {"bits", "group_size", "desc_act"} <= set(given):
        method = "gptq"  # AutoGPTQ left it out
    for fmt in FORMATS.values():
        if fmt.quant_method is not None and fmt.quant_method == method:
            return fmt.parse(given)
    known = ", ".join(dict.fromkeys(f.quant_method for f in FORMATS.values() if f.quant_method))
    raise QkitError(f"quantization method {method!r} is not supported", f"supported: {known}")


def kv_cache(found: FormatReader | None) -> str | None:
    """What a folder says that keys and values are rounded to in the cache ("fp8"); None: they are not."""
    return getattr(found, "kv_cache", None)


def _as_its_packing(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """An AutoRound folder that is packed as AutoGPTQ or AutoAWQ would, as one of theirs (AutoRound, export/)."""
    if given.get("quant_method") != "auto-round":
        return given
    packing = str(given.get("packing_format", "auto_round"))
    if packing.endswith("awq"):
        return {**given, "quant_method": "awq", "version": "gemm"}
    if not packing.endswith("gptq"):
        raise QkitError(
            f"AutoRound's packing_format {packing!r} is not supported",
            "supported: auto_round:auto_gptq, auto_round:auto_awq",
        )
    dynamic: dict[str, dict[str, Any]] = {}
    for module, own in as_object(given.get("extra_config"), "extra_config").items():
        own = as_object(own, module)
        bits = own.get("bits", 4)
        if not isinstance(bits, int):
            raise QkitError(f"extra_config of AutoRound gives {module!r} {bits!r} bits", "is the config whole?")
        kept = bits >= 16
        settings = {key: own[key] for key in ("bits", "group_size", "sym") if key in own}
        dynamic[f"{'-' if kept else '+'}:^{re.escape(module)}$"] = {} if kept else settings
    return {
        **given,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": {**dynamic, **as_object(given.get("dynamic"), "dynamic")},
    }
