"""What a calibration text meets in the model as it is: inputs of linears, keys and values; one decoder block in memory
at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..models.families import KV_SCALES
from ..spec.dtypes import TensorMeta
from .block import Runner
from .blocks import decoder_blocks, embed, filler
from .cost import batch_size
from .states import States
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
    folder: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """Weight name -> moments of its inputs, for those of `schemes` that are linears of a decoder block.

    tokens int64 [samples, length]; dtype of the forward pass, bfloat16 by default; folder: for temporary files; advance
    is called after each block.
    Deterministic on one device and thread count. Raises QkitError for an architecture that cannot be run."""
    found: dict[str, Moments] = {}

    def visit(at: str, block: nn.Module, run: Callable[[], None]) -> None:
        own = [name for name in schemes if name.startswith(at)]
        found.update(_moments(block, at, own, run, device))
        advance()

    _each_block(source, schemes, tokens, device, dtype, folder, visit)
    return found


def observe_cache(
    source: Source,
    tokens: torch.Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Name of each scale of the KV cache ("model.layers.0.self_attn.k_scale") -> the largest magnitude of what it is
    for: keys as the cache gets them, after norm and rotation, or values. Arguments as of `observe`.

    Raises QkitError for an architecture that cannot be run, and for keys or values that are not finite."""
    import torch

    from ..models.kv_cache import intercept

    found: dict[str, float] = {}

    def visit(at: str, block: nn.Module, run: Callable[[], None]) -> None:
        largest = [torch.zeros((), device=device) for _ in KV_SCALES]

        def see(module: nn.Module, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for i, x in enumerate(states):
                largest[i] = torch.maximum(largest[i], x.abs().amax().float())
            return states

        handle = intercept(block.self_attn, see)  # type: ignore[arg-type]
        run()
        handle.remove()
        for local, value in zip(KV_SCALES, largest, strict=True):
            name = f"{at}self_attn.{local}"
            if not bool(torch.isfinite(value)):
                raise QkitError(f"{name}: the calibration text gives NaN or infinity", "is the checkpoint damaged?")
            found[name] = float(value)
        advance()

    matrices = [name for name in source.names() if len(source.meta(name).shape) == 2]
    _each_block(source, matrices, tokens, device, dtype, folder, visit)
    return found


def _each_block(
    source: Source,
    names: Iterable[str],
    tokens: torch.Tensor,
    device: str,
    dtype: torch.dtype | None,
    folder: Path | None,
    visit: Callable[[str, nn.Module, Callable[[], None]], None],
) -> None:
    """Call visit(what the names of its tensors begin with, decoder block, run) for one block after another; `run`, to
    be called once, runs the text through the block. names: the matrices whose widths decide the size of batches."""
    import torch

    from ..models import skeleton

    dtype = dtype or torch.bfloat16
    model = skeleton.build(source.config)
    prefix, blocks = decoder_blocks(model)
    with torch.no_grad():
        inside = [name for name in names if name.startswith(prefix)]
        size = batch_size(source, inside, tokens.shape[1], dtype.itemsize)
        hidden = States(-(-len(tokens) // size), folder)
        fill = filler(model, source, device, dtype)
        calls = embed(model, blocks, tokens, size, device, fill, hidden)
        for index, block in enumerate(blocks):
            at = f"{prefix}{index}."
            fill(at[:-1])
            visit(at, block, partial(Runner(block, calls[index], device).advance, hidden))
            skeleton.dematerialize(block)


def _moments(block: nn.Module, at: str, names: list[str], run: Callable[[], None], device: str) -> dict[str, Moments]:
    """The moments of the inputs of one block's linears."""
    statistics: dict[str, InputMoments] = {}
    hooks = []
    for name in names:
        module = block.get_submodule(name.removeprefix(at).removesuffix(".weight"))
        statistics[name] = InputMoments(int(module.in_features), device)  # type: ignore[arg-type]

        def see(module: nn.Module, inputs: tuple[Any, ...], own: InputMoments = statistics[name]) -> None:
            own.add(inputs[0])

        hooks.append(module.register_forward_pre_hook(see))
    run()
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
