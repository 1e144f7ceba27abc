"""Run a calibration text through a model one decoder block at a time, quantizing each linear as it is reached.

Only one block's weights are in memory. Hidden states are carried from block to block, and within a block from layer
to layer, through what is already quantized: o_proj is fitted to what the quantized q, k and v produce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..models import skeleton
from .block import Block, BlockResult, Runner, install, set_tensor
from .cost import WAITING_BYTES, batch_size, waiting_bytes
from .states import States

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.weight import Weight
    from ..methods import Method
    from ..sources.types import Source
    from ..spec import LayerSpec


def quantize_blocks(
    source: Source,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    method: Method,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    done: Callable[[int], Mapping[str, Weight | torch.Tensor] | None] = lambda index: None,
    waiting: int = WAITING_BYTES,
    folder: Path | None = None,
    **options: Any,
) -> Iterator[BlockResult]:
    """Quantize the weights in `schemes` with `method`; yields one BlockResult per decoder block, in order.

    schemes   weight name -> LayerSpec; each must be an nn.Linear of a decoder block
    tokens    int64 [samples, length]; no padding
    dtype     of the forward pass, bfloat16 by default; weights are quantized from what the source holds
    done      tensors of blocks finished earlier by name, quantized and replaced ones, or None; results are then
              bit-identical to an uninterrupted run
    waiting   bytes of activations that may be held to save passes; decides no bit
    folder    for temporary files: the hidden states of a long text
    options   passed to `method.quantize`

    Deterministic on one device and thread count. Raises QkitError, before any work, for an architecture that cannot
    be run or a name in `schemes` that is no linear layer of a block; later for NaN in weights or activations.
    """
    import torch

    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [samples, length], not {list(tokens.shape)}")
    dtype = dtype or torch.bfloat16
    model = skeleton.build(source.config)
    prefix, blocks = decoder_blocks(model)
    _check_names(prefix, blocks, schemes, method)
    # As a decorator no_grad covers the generator's own code and not, between two blocks, its consumer's.
    return torch.no_grad()(_run)(model, source, schemes, tokens, method, device, dtype, done, waiting, folder, options)


def _run(
    model: nn.Module,
    source: Source,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    method: Method,
    device: str,
    dtype: torch.dtype,
    done: Callable[[int], Mapping[str, Weight | torch.Tensor] | None],
    waiting: int,
    folder: Path | None,
    options: dict[str, Any],
) -> Iterator[BlockResult]:
    from ..models.experts import Experts

    prefix, blocks = decoder_blocks(model)
    size = batch_size(source, schemes, tokens.shape[1], dtype.itemsize)
    side_by_side = waiting_bytes(source, schemes, tokens.numel(), dtype.itemsize) <= waiting
    for module in model.modules():
        if isinstance(module, Experts):
            module.call_all = True  # so that every batch's pass meets the same linears in the same order
    hidden = States(-(-len(tokens) // size), folder)
    fill = filler(model, source, device, dtype)
    calls = embed(model, blocks, tokens, size, device, fill, hidden)
    for index, block in enumerate(blocks):
        at = f"{prefix}{index}."
        fill(at[:-1])
        own = {name: scheme for name, scheme in schemes.items() if name.startswith(at)}
        runner = Runner(block, calls[index], device)
        ready = done(index)
        result = BlockResult(index)
        if own and ready is None:
            result = Block(runner, index, at, source, own, method, options, folder).quantize(hidden, side_by_side)
        else:
            _put_back(block, index, at, own, ready or {})
            runner.advance(hidden)
        skeleton.dematerialize(block)
        yield result


def _put_back(
    block: nn.Module, index: int, at: str, names: Iterable[str], ready: Mapping[str, Weight | torch.Tensor]
) -> None:
    """Give a block what an earlier run made of it."""
    import torch

    for name in names:
        if name not in ready:
            raise QkitError(f"the finished part of block {index} lacks {name}", "use --restart")
    for name, value in ready.items():
        local = name.removeprefix(at)
        if isinstance(value, torch.Tensor):
            set_tensor(block, local, value)
        else:
            install(block.get_submodule(local.removesuffix(".weight")), value)


def decoder_blocks(model: nn.Module) -> tuple[str, Any]:
    from ..models.experts import decoder_of

    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder.layers)
    return prefix + ".", decoder.layers


def _check_names(prefix: str, blocks: Any, schemes: Mapping[str, LayerSpec], method: Method) -> None:
    from torch import nn

    linears = {
        f"{prefix}{index}.{name}.weight"
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name in schemes:
        if name not in linears:
            raise QkitError(
                f"{name} is not a linear layer of a decoder block, so {method.name} has no inputs to fit it to",
                "leave it out with --skip, or use --method rtn",
            )


def embed(
    model: nn.Module,
    blocks: Any,
    tokens: torch.Tensor,
    size: int,
    device: str,
    fill: Callable[[str], None],
    hidden: States,
) -> list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Append what the first block is given to `hidden`, a tensor for each batch of `size`, on the CPU; returns for each
    block: batch size -> the other arguments it is called with. fill: reads the weights of a module, by its name; they
    are freed again.

    The model itself computes masks and position embeddings: it runs once with blocks that only take notes."""
    decoder, outside = around(model, blocks)
    for name in outside:
        fill(name)
    calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = [{} for _ in blocks]
    keep = True

    def take_notes(index: int) -> Callable[..., Any]:
        def forward(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index == 0 and keep:
                hidden.append(states)
            calls[index].setdefault(states.shape[0], (args, kwargs))
            return states

        return forward

    for index, block in enumerate(blocks):
        block.forward = take_notes(index)
    try:
        for batch in tokens.split(size):
            decoder(batch.to(device), use_cache=False)
        keep = False
        decoder(tokens[:1].to(device), use_cache=False)  # arguments for one sample
    finally:
        for block in blocks:
            del block.forward
    for name in outside:
        skeleton.dematerialize(model.get_submodule(name))
    return calls


def around(model: nn.Module, blocks: Any) -> tuple[nn.Module, list[str]]:
    """(the module that has the blocks, the names of what else it has: embedding, norm, rotation)."""
    from ..models.experts import decoder_of

    decoder: nn.Module = decoder_of(model)
    stem = next(name for name, module in model.named_modules() if module is decoder)
    return decoder, [f"{stem}.{name}" for name, module in decoder.named_children() if module is not blocks]


def filler(model: nn.Module, source: Source, device: str, dtype: torch.dtype) -> Callable[[str], None]:
    """Reads the weights of a module of `model`, by its name."""

    def fill(name: str) -> None:
        skeleton.materialize(model.get_submodule(name), source.read, f"{name}.", dtype, device)

    return fill
