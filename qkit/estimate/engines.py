"""The engines whose speed can be predicted: what a name means, and how each goes about a step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..spec import LayerSpec
from .roofline import Manner


@dataclass(frozen=True)
class Engine:
    """family: "eager" (a host that starts each kernel of a Python model), "graph" (one start a step: CUDA graphs,
    compiled models), "native" (a program of its own), "" (not known). head: what the output head is held in: "16" bits,
    the "weights"' bits, or "gguf" (6 bits or more). half_sums: products are added up in 16 bits where that is faster,
    which GeForce cards do at twice the rate."""

    name: str
    family: str
    head: str = "16"
    half_sums: bool = False
    manner: Manner = field(default_factory=Manner)


_LLAMA = Manner(chunked=True, serial=True)
ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine("vllm", "graph"),
        Engine("sglang", "graph"),
        Engine("trt-llm", "graph"),
        Engine("lmdeploy", "graph"),
        Engine("tgi", "graph"),
        Engine("qserve", "graph"),
        Engine("compile", "graph", head="weights"),
        Engine("transformers", "eager", manner=Manner(overlaps=True, serial=True, repeats=True)),
        Engine("autoawq", "eager", manner=Manner(overlaps=True, serial=True)),
        Engine("llama.cpp", "native", head="gguf", half_sums=True, manner=_LLAMA),
        Engine("ik_llama.cpp", "native", head="gguf", half_sums=True, manner=_LLAMA),
        Engine("exllama", "native", head="weights", half_sums=True, manner=Manner(serial=True)),
        Engine("mlx", "native", head="weights"),
        Engine("mlc", "native", head="weights"),
        Engine("tinychat", "native"),
        Engine("qkit", "native"),
    )
}
UNKNOWN = Engine("unknown", "")

# The first pattern that a published name has says which engine it is.
_NAMES = (
    (r"ik_llama", "ik_llama.cpp"),
    (r"llama\.?cpp|llama-bench|ollama|kobold|lm.?studio|llamafile|gguf", "llama.cpp"),
    (r"auto-?awq", "autoawq"),
    (r"exllama|tabby", "exllama"),
    (r"mlx", "mlx"),
    (r"mlc", "mlc"),
    (r"tinychat", "tinychat"),
    (r"qserve|lserve", "qserve"),
    (r"vllm|aphrodite", "vllm"),
    (r"sglang", "sglang"),
    (r"trt|tensorrt", "trt-llm"),
    (r"lmdeploy|turbomind", "lmdeploy"),
    (r"\btgi\b|text-generation-inference", "tgi"),
    (r"torchao\(eager\)", "transformers"),
    (r"gpt-fast|torchao|gemlite|torch\.?compile|compile", "compile"),
    (r"transformers|\bhf\b|bitsandbytes|bnb|auto-?gptq|gptqmodel|optimum|hqq|quanto|eetq|unsloth", "transformers"),
    (r"qkit", "qkit"),
)
# Kernels of which one engine may have several, by a word in its name or in the format's.
_LIBRARIES = ("tinygemm", "gemlite", "marlin", "machete", "autoquant", "gemv", "triton")


def named(text: str) -> Engine:
    """The engine that a published name means; `UNKNOWN` where it is none of those here."""
    if text.lower() in ENGINES:
        return ENGINES[text.lower()]
    found = next((name for pattern, name in _NAMES if re.search(pattern, text, re.IGNORECASE)), None)
    return ENGINES[found] if found else UNKNOWN


def release(engine: Engine) -> str:
    """The release that a prediction speaks of, as figures name it: of qkit this one, of others none in particular."""
    return engine.name if engine.name == "qkit" else ""


# What an engine multiplies weights of a kind with, where it is not told otherwise.
_DEFAULTS = {
    ("vllm", "int4"): "marlin",
    ("vllm", "int8"): "marlin",
    ("sglang", "int4"): "marlin",
    ("sglang", "int8"): "marlin",
}


def library(engine: Engine, kernel: str, *texts: str) -> str:
    """The kernels that words of an engine or a format name; else the engine's own choice, "" where it has one alone."""
    told = next((word for word in _LIBRARIES if any(word in text.lower() for text in texts)), None)
    return told if told is not None else _DEFAULTS.get((engine.name, kernel), "")


# What a published format is to a kernel: the first pattern counts.
_KERNELS = (
    (r"q4_0_\d|gguf.*(q[458]_[01]\b)|\bq[458]_[01]\b", "gguf0"),
    (r"gguf.*\b(b?f16)\b", "gguf16"),
    (r"gguf|q\d_k|iq\d", "ggufk"),
    (r"nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"w4a8", "w4a8"),
    (r"w8a8", "w8a8"),
    (r"fp8", "fp8"),
    (r"fp6", "fp6"),
    (r"nf4|fp4", "nf4"),
    (r"llm\.int8", "llm.int8"),
    (r"int8|w8a16|8.?bit|q8", "int8"),
    (r"exl\d|int4|awq|gptq|w4a16|hqq|4.?bit|q4|int3|3.?bit", "int4"),
    (r"(b?f|fp)(16|32)|half", "16"),
)


def kernel_named(text: str, bits: float) -> str:
    """The kind of kernel for a format as published; by its bits where the words say nothing."""
    text = re.sub(r"\([^)]*kv[^)]*\)", "", text, flags=re.IGNORECASE)  # of the cache, not of the weights
    found = next((kind for pattern, kind in _KERNELS if re.search(pattern, text, re.IGNORECASE)), None)
    return found or ("16" if bits > 12 else "int8" if bits > 6 else "int4")


def kernel_of(spec: LayerSpec | None) -> str:
    """The kind of kernel that multiplies with weights stored so; None: 16 bits."""
    if spec is None:
        return "16"
    if spec.kind == "ggml":
        block = spec.grid.block.lower()
        return "gguf16" if block in ("f16", "bf16") else "gguf0" if re.fullmatch(r"q\d_[01]", block) else "ggufk"
    if spec.kind == "int":
        if spec.input is not None:
            return "w8a8" if spec.bits == 8 else "w4a8"
        return "int8" if spec.bits == 8 else "int4"
    return {"fp4": "nf4"}.get(spec.kind, spec.kind)
