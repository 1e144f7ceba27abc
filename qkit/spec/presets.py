"""The schemes that users name."""

from __future__ import annotations

from dataclasses import replace

from ..errors import QkitError
from .layer import Activations, LayerSpec, Scale, fp8, ggml, integer, llm_int8, mxfp4, nvfp4, table, w8a8

AUTO_GROUP_SIZES = (128, 64, 32)

_DOUBLE = Scale((1, 256), "F32")  # bitsandbytes' double quantization

# llama.cpp's file types: which block type each tensor gets is chosen as llama-quantize does (formats/gguf/mixes.py).
MIXES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s",
    "q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "mxfp4_moe", "f16", "bf16",
)  # fmt: skip

# None: keep the source's values (an export, with a GGUF source dequantized).
PRESETS: dict[str, LayerSpec | None] = {
    "w4a16": integer(4),
    "w4a16-asym": integer(4, symmetric=False),
    "w8a16": integer(8),
    "w8a16-asym": integer(8, symmetric=False),
    "w3a16": integer(3),
    "w3a16-asym": integer(3, symmetric=False),
    "w2a16": integer(2),
    "w2a16-asym": integer(2, symmetric=False),
    "w8a8": w8a8(),
    "fp8": replace(fp8(), input=Activations("float", 8)),
    "fp8-block": replace(fp8((128, 128)), input=Activations("float", 8, per="group")),
    "nvfp4a16": nvfp4(),
    "mxfp4a16": mxfp4(),
    "nf4": table("nf4"),
    "nf4-dq": table("nf4", over=_DOUBLE),
    "fp4": table("fp4"),
    "fp4-dq": table("fp4", over=_DOUBLE),
    "int8": llm_int8(),
    **{name: ggml(name) for name in MIXES},
    "none": None,
}


def preset(name: str) -> LayerSpec | None:
    """The scheme a user named; raises QkitError listing the known ones."""
    key = name.lower() if name.lower() in MIXES else name.lower().replace("_", "-")
    if key not in PRESETS:
        raise QkitError(f"unknown scheme {name!r}", "known schemes: " + ", ".join(PRESETS))
    return PRESETS[key]
