"""`load`: a checkpoint as a transformers model whose quantized linears are `QuantLinear`."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import formats
from ..errors import QkitError
from ..hardware.detect import resolve
from ..spec.dtypes import named_dtype, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats import FormatReader
    from ..sources.types import Source
    from ..spec import LayerSpec

_log = logging.getLogger("qkit")

# In checkpoints of old writers; every model computes them.
_RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
_SHOWN = 5


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

    from ..models import kv_cache
    from ..models.skeleton import build, materialize
    from ..sources import open_source
    from ..sources.sliced import sliced
    from . import decoder

    opened = open_source(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source
    opened = sliced(opened) or opened
    target = torch.device(resolve(device).id)
    config = {k: v for k, v in opened.config.items() if k != "quantization_config"}
    name = _dtype_name(dtype if dtype is not None else config.get("dtype") or config.pop("torch_dtype", None))
    config["dtype"] = str(torch_dtype(name)).removeprefix("torch.")
    act_dtype = torch_dtype(name)

    reader = formats.reader(opened.config)
    schemes = formats.quantized_modules(reader, opened) if reader else {}
    model = build(config)
    if _head_of_its_own(model, opened):
        model = build({**config, "tie_word_embeddings": False})
    if formats.kv_cache(reader):
        kv_cache.add_rounding(model)
    _check_tensors(model, opened, reader, schemes)
    kernels: Counter[str] = Counter()
    for module, scheme in schemes.items():
        assert reader is not None
        layer = _quant_linear(opened, reader, module, scheme, act_dtype, model.get_submodule(module))
        layer.to(target)
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        kernels[layer.select(act_dtype).name] += 1
    materialize(model, opened.read, dtype=act_dtype, device=str(target))
    if formats.kv_cache(reader):
        kv_cache.check_scales(model)
    log_kernels(kernels, target)
    with torch.no_grad():
        _generation_config(model, opened)
    model.eval()
    if target.type == "cpu" and (reason := decoder.attach(model)) is not None:
        _log.info("decoding runs the model's own steps: %s", reason)
    return model


def _dtype_name(dtype: Any) -> str:
    name = named_dtype("bfloat16" if dtype is None else dtype)
    if name is None:
        raise QkitError(
            f"cannot run in dtype {str(dtype).removeprefix('torch.')!r}", "use bfloat16, float16 or float32"
        )
    return name


def _check_tensors(
    model: nn.Module, source: Source, reader: FormatReader | None, schemes: Mapping[str, LayerSpec]
) -> None:
    """Names and shapes, before anything is read. `build` left what a checkpoint must hold on meta."""
    from torch import nn

    wanted: dict[str, tuple[int, ...]] = {}
    optional: set[str] = set()
    seen: set[int] = set()
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in model.named_buffers() if b.is_meta),
    ]:
        wanted[name] = tuple(tensor.shape)
        if id(tensor) in seen:  # a tied weight: stored under its first name, or under both
            optional.add(name)
        seen.add(id(tensor))
    for module, scheme in schemes.items():
        assert reader is not None
        try:
            linear = model.get_submodule(module)
        except AttributeError:
            raise QkitError(f"unexpected tensors: the model has no module {module!r}") from None
        if not isinstance(linear, nn.Linear):
            raise QkitError(f"{module!r} is stored quantized, but is a {type(linear).__name__}, not a linear layer")
        del wanted[f"{module}.weight"]
        for local in formats.local_names(reader, source, module, scheme):
            wanted[f"{module}.{local}"] = source.meta(f"{module}.{local}").shape

    names = set(source.names())
    missing = [n for n in wanted if n not in names and n not in optional]
    unexpected = [n for n in source.names() if n not in wanted and not _RECOMPUTED.search(n)]
    hint = "is the checkpoint complete, and is its config.json its own?"
    if missing:
        raise QkitError(f"the checkpoint lacks {_list(missing)}", hint)
    # Other writers give every quantized linear a bias, of zeros where the model has none.
    unexpected = [n for n in unexpected if not (n.endswith(".bias") and n[:-5] in schemes and _is_zero(source, n))]
    if unexpected:
        raise QkitError(f"the checkpoint holds tensors the model has not: {_list(unexpected)}", hint)
    for name, shape in wanted.items():
        if name in names and source.meta(name).shape != shape:
            raise QkitError(
                f"tensor {name!r} has shape {list(source.meta(name).shape)}, its config says {list(shape)}", hint
            )


def _is_zero(source: Source, name: str) -> bool:
    return not bool(source.read(name).any())


def _head_of_its_own(model: Any, source: Source) -> bool:
    """Whether the config ties the head to the embedding, and the checkpoint has another one: which is used, as in
    transformers."""
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    named = {id(module): name for name, module in model.named_modules()}
    stored = set(source.names())
    keys = [f"{named[id(module)]}.weight" for module in (head, embedding)]
    return all(key in stored for key in keys) and not torch.equal(*(source.read(key) for key in keys))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _quant_linear(
    source: Source, reader: FormatReader, module: str, scheme: LayerSpec, dtype: torch.dtype, linear: Any
) -> Any:
    from ..formats import read_weight
    from .linear import quant_linear

    weight = read_weight(reader, source, module, scheme)
    shape = (weight.packed.shape[0], weight.in_features)
    if shape != (linear.out_features, linear.in_features):
        raise QkitError(f"{module} is {list(shape)}, its config says {[linear.out_features, linear.in_features]}")
    bias = source.read(f"{module}.bias").to(dtype) if linear.bias is not None else None
    return quant_linear(weight, bias, activations_of(scheme))


def activations_of(scheme: LayerSpec) -> str | None:
    """How kernels may quantize the layer's inputs, where its scheme says per token; stored scales are not used."""
    given = scheme.input
    if given is None or not given.dynamic or given.per != "token" or given.bits != 8:
        return None
    return "fp8" if given.kind == "float" else "int8"


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
                given = json.loads(sidecar.read())
            except ValueError as error:
                raise QkitError(f"generation_config.json is not valid JSON: {error}") from error
            try:
                model.generation_config = GenerationConfig.from_dict(given)
            except Exception as error:  # transformers' validators raise classes of their own
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                _log.warning("generation_config.json is ignored, transformers refuses it: %s", reason)
            return
