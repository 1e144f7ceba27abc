"""A model's code without its weights: transformers modules with parameters on meta, filled block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import QkitError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

# Tested: logits equal those of transformers' own load, parameter names equal those of the checkpoint.
ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "phi3",
    "smollm3", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "llama4_text", "gpt_oss",
)  # fmt: skip


def check_architecture(config: Mapping[str, Any]) -> str:
    """The model_type of a parsed config.json; raises QkitError where `build` has none such. Needs no torch."""
    model_type = config.get("model_type")
    if model_type in ARCHITECTURES:
        return str(model_type)
    if model_type is None:
        raise QkitError("config.json names no model_type", "is this folder a transformers checkpoint?")
    raise QkitError(
        f"running architecture {model_type!r} is not supported",
        "method rtn needs no model code and converts any architecture; known here: " + ", ".join(ARCHITECTURES),
    )


def import_code(config: Mapping[str, Any]) -> None:
    """Import now what `build` of a parsed config.json imports. Raises QkitError for an unknown architecture."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[check_architecture(config)]]


def build(config: Mapping[str, Any] | PreTrainedConfig) -> nn.Module:
    """The transformers causal LM for `config`: parameters on meta, buffers real, eval mode, attention as
    transformers prefers (sdpa; eager for Gemma 2, whose soft-capped scores it has no other way to compute).

    Parameter names are those of the checkpoint (experts unfused: see `experts`). The dtype is the config's,
    bfloat16 where it names none. A quantization_config is ignored. Raises QkitError for an unknown
    architecture or a config that transformers refuses.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from .experts import unfuse

    class EmptyOnMeta(TorchFunctionMode):
        """Parameters start as torch.empty; buffers are computed. So only the former goes to meta."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.empty and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    given = dict(config) if isinstance(config, Mapping) else config.to_dict()
    given.pop("quantization_config", None)
    model_type = check_architecture(given)
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(given)
        dtype = getattr(parsed, "dtype", None) or torch.bfloat16
        with EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    except Exception as error:  # transformers' validators raise classes of their own, one family per version
        raise QkitError(
            f"transformers cannot build {model_type!r} from this config: {error}",
            "check the values in config.json",
        ) from error
    unfuse(model, model_type)
    _parameters_to_meta(model)
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def _parameters_to_meta(model: nn.Module) -> None:
    """Norm weights start as torch.ones, some routers as torch.zeros: these too go to meta."""
    from torch import nn

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set:
                raise QkitError(f"{type(model).__name__}: buffer {name!r} has no value without a checkpoint")


def materialize(
    module: nn.Module,
    read: Callable[[str], torch.Tensor],
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Fill every meta parameter and persistent meta buffer of `module` with read(prefix + name), in place.

    Parameters are cast to `dtype` (None: as read); buffers keep their own dtype; everything moves to `device`,
    real buffers too. A parameter that occurs twice (tied embeddings) is read once, under its first name, and
    stays one. To fill the head of a tied model by itself, pass the embedding's prefix.
    Raises QkitError for a tensor that is missing or has another shape.
    """
    import torch
    from torch import nn

    filled: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        stem = f"{prefix}{path}." if path else prefix
        for name, old in list(owner._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in filled:
                value = _read(read, stem + name, old.shape).to(device=device, dtype=dtype)
                filled[id(old)] = nn.Parameter(value, requires_grad=False)
                filled[id(old)].replaced = old  # type: ignore[attr-defined]  # keeps id(old) from being reused
            owner._parameters[name] = filled[id(old)]
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and buffer.is_meta:
                owner._buffers[name] = _read(read, stem + name, buffer.shape)
    for parameter in filled.values():
        del parameter.replaced  # type: ignore[attr-defined]
    module.to(torch.device(device))


def dematerialize(module: nn.Module) -> None:
    """Drop the parameters of `module` again: back to meta, memory freed. Buffers stay."""
    from torch import nn

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _read(read: Callable[[str], torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    try:
        value = read(name)
    except KeyError as error:
        raise QkitError(
            f"the checkpoint lacks tensor {name!r}", "is it complete, and is its config its own?"
        ) from error
    if value.shape != shape:
        raise QkitError(f"tensor {name!r} has shape {list(value.shape)}, its config says {list(shape)}")
    return value
