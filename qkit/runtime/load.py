"""`load`: a checkpoint as a transformers model whose quantized linears are `QuantLinear`."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..hardware.detect import resolve
from ..untrusted import parse_json

if TYPE_CHECKING:
    import torch

    from ..sources.types import Source

_log = logging.getLogger("qkit")


def load(
    source: str | os.PathLike[str] | Source,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A transformers model, in eval mode, ready for `generate`.

    source  what `open_source` takes: a folder (plain, or quantized as compressed-tensors or GPTQ), a .gguf file
            (dequantized), a Hub id, "demo"; or an open Source
    device  "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1"
    dtype   of activations and of weights that are not quantized: "bfloat16", "float16", "float32"; None: the
            config's, bfloat16 where it names none

    Quantized weights stay packed; tensors are read one at a time, so memory peaks at the model and one tensor.
    Raises QkitError for an unsupported architecture or method, and for tensors that are missing, unexpected or
    of the wrong shape, before any is read.
    """
    import torch

    from ..sources import open_source
    from .frame import Frame

    opened = open_source(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source
    target = torch.device(resolve(device).id)
    frame = Frame(opened, target, dtype)
    log_kernels(frame.fill(), target)
    model = frame.model
    with torch.no_grad():
        _generation_config(model, opened)
    model.eval()
    if target.type == "cpu":
        quicken(model)
    return model


def quicken(model: Any) -> None:
    """What a loaded model on the CPU gets: a head laid out for torch, and the fast decoding step."""
    from . import decoder, head

    head.lay_out(model)
    if (reason := decoder.attach(model)) is not None:
        _log.info("decoding runs the model's own steps: %s", reason)


def log_kernels(kernels: Counter[str], device: torch.device) -> None:
    """One line a kernel: how many linears run on it, and where."""
    from ..kernels import backend

    for name, count in kernels.items():
        where = backend() if device.type == "cpu" else str(device)
        _log.info("%d linears: %s (%s)", count, name, where)


def _generation_config(model: Any, source: Source) -> None:
    from transformers import GenerationConfig

    for sidecar in source.sidecars:
        if sidecar.name == "generation_config.json":
            try:
                given = parse_json(sidecar.read())
            except ValueError as error:
                raise QkitError(f"generation_config.json is not valid JSON: {error}") from error
            try:
                model.generation_config = GenerationConfig.from_dict(given)
            except Exception as error:  # transformers' validators raise classes of their own
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                _log.warning("generation_config.json is ignored, transformers refuses it: %s", reason)
            return
