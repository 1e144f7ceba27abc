"""Statistics of the inputs of linears over a calibration text, of the model as it is: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..spec.dtypes import TensorMeta
from .block import Runner
from .blocks import batch_size, decoder_blocks, embed
from .statistics import InputMoments, Moments

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..sources.types import Source
    from ..spec import LayerSpec
    from ..storage.store import FileDigest, Store

_MAGNITUDE, _SQUARE, _TOKENS = "magnitude", "square", "tokens"


def observe(
    source: Source,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """Weight name -> moments of its inputs, for those of `schemes` that are linears of a decoder block.

    tokens int64 [samples, length]; dtype of the forward pass, bfloat16 by default; advance is called after each block.
    Deterministic on one device and thread count. Raises QkitError for an architecture that cannot be run."""
    import torch

    from ..models import skeleton

    dtype = dtype or torch.bfloat16
    model = skeleton.build(source.config)
    prefix, blocks = decoder_blocks(model)
    found: dict[str, Moments] = {}
    with torch.no_grad():
        inside = {name: scheme for name, scheme in schemes.items() if name.startswith(prefix)}
        size = batch_size(source, inside, tokens.shape[1], dtype.itemsize)
        hidden, calls = embed(model, blocks, source, tokens, size, device, dtype)
        for index, block in enumerate(blocks):
            at = f"{prefix}{index}."
            skeleton.materialize(block, source.read, at, dtype, device)
            own = [name for name in inside if name.startswith(at)]
            found |= _block(block, at, own, Runner(block, calls[index], device), hidden, device)
            skeleton.dematerialize(block)
            advance()
    return found


def _block(
    block: nn.Module, at: str, names: list[str], runner: Runner, hidden: list[torch.Tensor], device: str
) -> dict[str, Moments]:
    """The moments in one block; `hidden` is replaced by its output."""
    statistics: dict[str, InputMoments] = {}
    hooks = []
    for name in names:
        module = block.get_submodule(name.removeprefix(at).removesuffix(".weight"))
        statistics[name] = InputMoments(int(module.in_features), device)  # type: ignore[arg-type]

        def see(module: nn.Module, inputs: tuple[Any, ...], own: InputMoments = statistics[name]) -> None:
            own.add(inputs[0])

        hooks.append(module.register_forward_pre_hook(see))
    runner.advance(hidden)
    for hook in hooks:
        hook.remove()
    return {name: own.result() for name, own in statistics.items()}


def write_moments(store: Store, name: str, found: Mapping[str, Moments]) -> FileDigest:
    """As safetensors: two vectors and a count for each weight."""
    import torch

    from ..storage.writer import write_safetensors

    entries, tensors = [], []
    for weight, moments in found.items():
        for part, value in ((_MAGNITUDE, moments.magnitude), (_SQUARE, moments.square)):
            entries.append((f"{weight}.{part}", TensorMeta("F32", tuple(value.shape))))
            tensors.append(value.cpu())
        entries.append((f"{weight}.{_TOKENS}", TensorMeta("I64", (1,))))
        tensors.append(torch.tensor([moments.tokens]))
    return write_safetensors(store, name, entries, tensors)


def read_moments(store: Store, name: str) -> dict[str, Moments]:
    """What `write_moments` wrote."""
    from ..storage.safetensors import SafetensorsFile

    file = SafetensorsFile(store.open(name))
    weights = [n.removesuffix(f".{_SQUARE}") for n in file.names() if n.endswith(f".{_SQUARE}")]
    found = {
        weight: Moments(
            file.read(f"{weight}.{_MAGNITUDE}"), file.read(f"{weight}.{_SQUARE}"), int(file.read(f"{weight}.{_TOKENS}"))
        )
        for weight in weights
    }
    file.close()
    return found
