"""transformers' own `from_pretrained` for the quantized folders that qkit reads, with `QuantLinear` modules.

Nothing but qkit is needed: no compressed-tensors, no optimum, no gptqmodel. transformers builds the model and reads
the files as ever; the quantizer puts a `Stored` module, which has the tensors on disk as buffers, in each quantized
linear's place before that, and turns it into a `QuantLinear` afterwards.

Whose folders: config.json names "compressed-tensors", "gptq", "awq" or "bitsandbytes", methods for which transformers
has loaders that need other packages. Where such a package is missing, qkit takes the method over as soon as both
libraries are imported (`transformers_hook`); where it is there, only when asked to (`qkit.register_transformers()`).
What qkit does not read (3 bits, ...) goes to transformers' own loader in every case.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import import_utils
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import formats
from ..errors import QkitError
from ..models import kv_cache
from ..models.experts import FAMILIES, unfuse
from ..models.families import is_kv_scale
from ..spec import Scale
from ..spec.dtypes import TensorMeta, torch_dtype
from ..storage.safetensors import SafetensorsFile
from .frame import activations_of
from .linear import QuantLinear, quant_linear
from .load import log_kernels, quicken

if TYPE_CHECKING:
    from ..formats import Format
    from ..spec import LayerSpec

NAME = "qkit"  # in transformers' tables
_DOT = "_dot_"
_ONE_EXPERT = re.compile(
    r"\.layers\.(\d{1,9})\..*\.experts\.\d+\."
)  # a layer whose files hold a matrix for each expert
_log = logging.getLogger("qkit")

# method -> whether transformers' own loader has the packages that it needs
_METHODS = {
    "compressed-tensors": lambda: import_utils.is_compressed_tensors_available(),
    "awq": lambda: import_utils.is_gptqmodel_available(),
    "bitsandbytes_4bit": lambda: import_utils.is_bitsandbytes_available(),
    "bitsandbytes_8bit": lambda: import_utils.is_bitsandbytes_available(),
    "gptq": lambda: import_utils.is_gptqmodel_available() and import_utils.is_optimum_available(),
}


def register_transformers(replace: bool = True) -> None:
    """Make `from_pretrained` load compressed-tensors and GPTQ folders as `QuantLinear`; may be called repeatedly.

    replace  also where transformers has what it needs to load the method itself"""
    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(QkitConfig)
        auto.register_quantizer(NAME)(QkitQuantizer)
    table: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method, loads_itself in _METHODS.items():
        if method in table and not isinstance(table[method], _Either) and (replace or not loads_itself()):
            table[method] = _Either(table[method])


class _Either:
    """In the place of a method's config class: `QkitConfig` for what qkit reads, the class itself for the rest."""

    def __init__(self, other: Any):
        self.other = other

    def from_dict(self, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return QkitConfig.from_dict(config_dict, **kwargs)
        except QkitError as error:
            _log.info("left to transformers: %s", error.message)
            return self.other.from_dict(config_dict, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.other, name)


class QkitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A folder's `quantization_config`, kept as it is. Raises QkitError for one that qkit does not read."""

    def __init__(self, **given: Any):
        self.quant_method: Any = NAME
        self.given = given
        formats.reader({"quantization_config": given})

    def to_dict(self) -> dict[str, Any]:
        """What the file said, so that a model saved again is the same kind of folder."""
        return dict(self.given)


def _attribute(local: str) -> str:
    """A local name as a buffer's, which cannot hold a dot: bitsandbytes' "weight.absmax"."""
    return local.replace(".", _DOT)


def _local(attribute: str) -> str:
    return attribute.replace(_DOT, ".")


class Stored(nn.Module):
    """The tensors of one quantized linear as they lie on disk: what transformers' loading fills."""

    def __init__(self, metas: Mapping[str, TensorMeta], scheme: LayerSpec):
        super().__init__()
        self.scheme = scheme
        for local, meta in metas.items():
            self.register_buffer(
                _attribute(local), torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device="meta")
            )

    def quant_linear(self, fmt: Format, dtype: torch.dtype) -> QuantLinear:
        """Raises QkitError where the tensors disagree with each other or the config."""
        tensors = {_local(name): t for name, t in self.named_buffers() if name != "bias"}
        bias = getattr(self, "bias", None)
        return quant_linear(
            fmt.unpack(tensors, self.scheme), None if bias is None else bias.to(dtype), activations_of(self.scheme)
        )


class _Headers:
    """Names, types and shapes of every tensor in some safetensors files: as much of a Source as is needed here."""

    def __init__(self, paths: list[str]):
        self._metas: dict[str, TensorMeta] = {}
        for path in paths:
            file = SafetensorsFile(path)
            self._metas |= {name: file.meta(name) for name in file.names()}
            file.close()

    def names(self) -> list[str]:
        return list(self._metas)

    def meta(self, name: str) -> TensorMeta:
        return self._metas[name]


class QkitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Written for transformers 5 (quantizers/base.py)."""

    requires_calibration = True  # it loads what is quantized, and quantizes nothing
    quantization_config: QkitConfig

    def __init__(self, quantization_config: QkitConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        reader = formats.reader({"quantization_config": quantization_config.given})
        assert reader is not None
        self.reader = reader
        self.unfused = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise QkitError("packed weights cannot be offloaded to disk", "leave 'disk' out of device_map")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [str(f) for f in checkpoint_files or ()]
        if not files or not all(f.endswith(".safetensors") for f in files):
            raise QkitError("quantized models are loaded from safetensors files", "pass the folder they are in")
        model_type = model.config.get_text_config().model_type
        headers: Any = _Headers(files)
        if model_type in FAMILIES:
            unfuse(model, model_type, {int(m[1]) for name in headers.names() if (m := _ONE_EXPERT.search(name))})
            self.unfused = True
        if formats.kv_cache(self.reader):
            _add_cache_scales(model, headers)
        schemes = formats.quantized_modules(self.reader, headers)
        for module, name in _names_in_model(model, schemes).items():
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise QkitError(f"{module!r} is stored quantized, but is a {type(linear).__name__}, not a linear layer")
            names = formats.local_names(self.reader, headers, module, schemes[module])
            metas = {local: headers.meta(f"{module}.{local}") for local in names}
            if f"{module}.bias" in headers.names():
                metas["bias"] = headers.meta(f"{module}.bias")
            elif linear.bias is not None:
                raise QkitError(f"the checkpoint lacks tensor '{module}.bias'", "is it complete?")
            model.set_submodule(name, Stored(metas, schemes[module]))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts stay as they are on disk, one matrix each: nothing is merged into fused parameters."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        if self.unfused:
            weight_conversions = [c for c in weight_conversions if not isinstance(c, WeightConverter)]
        dotted = {
            _local(name)
            for m in model.modules()
            if isinstance(m, Stored)
            for name, _ in m.named_buffers()
            if _DOT in name
        }
        return [
            *(WeightRenaming(rf"\.{re.escape(n)}$", f".{_attribute(n)}") for n in sorted(dotted)),
            *weight_conversions,
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        kernels: Counter[str] = Counter()
        for name, module in list(model.named_modules()):
            if not isinstance(module, Stored):
                continue
            try:
                layer = module.quant_linear(self.reader.format, model.dtype)
            except QkitError as error:
                raise QkitError(f"{name}: {error.message}", error.hint) from error
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:  # accelerate moves inputs between the devices of a model
                _carry_over(hook, layer)
            model.set_submodule(name, layer.eval())
            kernels[layer.select(model.dtype).name] += 1
        if formats.kv_cache(self.reader):
            kv_cache.check_scales(model)
        if model.device.type == "cpu":
            quicken(model)
        log_kernels(kernels, model.device)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        kv_cache.remove_rounding(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                plain.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
                if module.bias is not None:
                    plain.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
                model.set_submodule(name, plain)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """`save_pretrained` writes the tensors of the format that the model was loaded from."""
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                for local in [key for key in module.state_dict() if key != "bias"]:
                    del state[f"{name}.{local}"]
                state |= {f"{name}.{k}": v for k, v in self._packed(name, module).items()}
        return state, {"format": "pt"}

    def _packed(self, name: str, module: QuantLinear) -> dict[str, torch.Tensor]:
        return self.reader.format.pack(module.quantized(), self.reader.scheme(name))

    def is_serializable(self) -> bool:
        """Not where scales were quantized themselves: layers hold them multiplied out."""
        return getattr(getattr(self.reader, "spec", None), "scale", Scale()).over is None

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top (`qkit.lora`); packed weights are frozen


def _add_cache_scales(model: Any, headers: _Headers) -> None:
    """Raises QkitError where the files hold another number of scales than the model has places for."""
    kv_cache.add_rounding(model)
    stored, wanted = sum(map(is_kv_scale, headers.names())), 2 * len(kv_cache.attentions(model))
    if stored != wanted:
        raise QkitError(
            f"the checkpoint holds {stored} scales of the KV cache where {type(model).__name__} has {wanted}",
            "is it complete, and is its config.json its own?",
        )


def _names_in_model(model: Any, modules: Mapping[str, Any]) -> dict[str, str]:
    """Names of modules in the files -> names in `model`, which differ for some architectures.

    Raises QkitError for a name the model has not."""
    keys = model.state_dict()
    names: dict[str, str] = {}
    renamings: list[Any] | None = None
    for module in modules:
        key = f"{module}.weight"
        if key not in keys:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key

            if renamings is None:
                renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
            key, _ = rename_source_key(key, renamings, [], model.base_model_prefix, keys)
        if key not in keys:
            raise QkitError(
                f"{module!r} is stored quantized, but {type(model).__name__} has no linear layer of that name",
                "is its config.json its own?",
            )
        names[module] = key.removesuffix(".weight")
    return names


def _carry_over(hook: Any, layer: QuantLinear) -> None:
    from accelerate.hooks import add_hook_to_module

    if getattr(hook, "offload", False):
        raise QkitError("packed weights cannot be offloaded", "use a device_map without 'cpu' beside a GPU")
    add_hook_to_module(layer, hook)
