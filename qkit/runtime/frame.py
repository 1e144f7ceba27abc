"""A checkpoint's model before its weights: names and shapes are checked, then all of it is filled, or one module after
another, with what is stored quantized as `QuantLinear`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import formats
from ..errors import QkitError
from ..spec.dtypes import named_dtype, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats import FormatReader
    from ..sources.types import Source
    from ..spec import LayerSpec

# In checkpoints of old writers; every model computes them.
_RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
_SHOWN = 5


class Frame:
    """model: the transformers model, in eval mode, its parameters on meta until `fill`; source: as it is read, one
    matrix per expert; dtype: of activations and of weights that are not quantized.

    dtype and errors as of `load`; no tensor is read, but for a head and an embedding that may be one."""

    def __init__(self, source: Source, device: str | torch.device, dtype: str | torch.dtype | None = None):
        import torch

        from ..models import kv_cache
        from ..models.families import check_blocks
        from ..models.skeleton import build
        from ..sources.sliced import sliced

        check_blocks(source.config, source.names(), source.label)  # before as many are built
        self.source = sliced(source) or source
        self.device = torch.device(device)
        config = {k: v for k, v in self.source.config.items() if k != "quantization_config"}
        name = _dtype_name(dtype if dtype is not None else config.get("dtype") or config.pop("torch_dtype", None))
        config["dtype"] = str(torch_dtype(name)).removeprefix("torch.")
        self.dtype = torch_dtype(name)
        self._reader = formats.reader(self.source.config)
        self._schemes = formats.quantized_modules(self._reader, self.source) if self._reader else {}
        self.model: Any = build(config)
        if _head_of_its_own(self.model, self.source):
            self.model = build({**config, "tie_word_embeddings": False})
        if formats.kv_cache(self._reader):
            kv_cache.add_rounding(self.model)
        _check_tensors(self.model, self.source, self._reader, self._schemes)
        self._first = _first_names(self.model)
        self._plain: dict[str, nn.Module] = {}  # the linears that quantized ones stand in for

    def fill(self, name: str = "") -> Counter[str]:
        """Read the weights of the module of that name, or of the whole model, tensor by tensor.

        Returns kernel name -> quantized linears that use it. Raises QkitError for what cannot be read."""
        from ..models import kv_cache
        from ..models.skeleton import materialize

        kernels: Counter[str] = Counter()
        for module, scheme in self._schemes.items():
            if name and module != name and not module.startswith(f"{name}."):
                continue
            assert self._reader is not None
            linear = self.model.get_submodule(module)
            layer = _quant_linear(self.source, self._reader, module, scheme, self.dtype, linear)
            layer.to(self.device)
            self._plain[module] = linear
            self._put(module, layer)
            kernels[layer.select(self.dtype).name] += 1
        prefix = f"{name}." if name else ""
        materialize(self.model.get_submodule(name), self._read, prefix, self.dtype, self.device)
        if formats.kv_cache(self._reader):
            kv_cache.check_scales(self.model, prefix)
        return kernels

    def empty(self, name: str) -> None:
        """Undo `fill`: the module's weights are freed."""
        from ..models.skeleton import dematerialize

        for module in [m for m in self._plain if m == name or m.startswith(f"{name}.")]:
            self._put(module, self._plain.pop(module))
        dematerialize(self.model.get_submodule(name))

    def is_tied(self, name: str) -> bool:
        """Whether the weight of the module of that name is another module's."""
        return f"{name}.weight" in self._first

    def _put(self, module: str, layer: nn.Module) -> None:
        parent, _, child = module.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)

    def _read(self, name: str) -> torch.Tensor:
        return self.source.read(self._first.get(name, name))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied weight -> its first one, under which it is read."""
    seen: dict[int, str] = {}
    return {
        name: seen[id(tensor)]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if seen.setdefault(id(tensor), name) != name
    }


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
