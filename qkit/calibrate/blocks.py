"""Run a calibration text through a model one decoder block at a time, quantizing each linear as it is reached.

Only one block's weights are in memory. Hidden states are carried from block to block, and within a block from layer
to layer, through what is already quantized: o_proj is fitted to what the quantized q, k and v produce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
    elsewhere: Elsewhere | None = None,
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
    elsewhere  does a block's work in the place of this process, with the same result
    options   passed to `method.quantize`

    Deterministic on one device and thread count. Raises QkitError, before any work, for an architecture that cannot
    be run or a name in `schemes` that is no linear layer of a block; later for NaN in weights or activations.
    """
    import torch

    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [samples, length], not {list(tokens.shape)}")
    decoder = Decoder(source, schemes, tokens.shape[1], device, dtype or torch.bfloat16)
    _check_names(decoder.prefix, decoder.blocks, schemes, method)
    # As a decorator no_grad covers the generator's own code and not, between two blocks, its consumer's.
    return torch.no_grad()(_run)(decoder, schemes, tokens, method, done, waiting, folder, elsewhere, options)


class Decoder:
    """A model whose blocks are filled, one at a time, with what a source has: what they are called with besides hidden
    states, and how much of a text at once.

    size    windows of a batch
    calls   for each block: batch size -> the other arguments it is called with. Once `embed` was called"""

    def __init__(self, source: Source, schemes: Mapping[str, LayerSpec], length: int, device: str, dtype: torch.dtype):
        """schemes: weight name -> LayerSpec, of whatever is quantized; length: tokens of a window."""
        from ..models.experts import Experts

        self.source, self.schemes, self.device, self.dtype = source, schemes, device, dtype
        self.model = skeleton.build(source.config)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.size = batch_size(source, schemes, length, dtype.itemsize)
        self.fill = filler(self.model, source, device, dtype)
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.call_all = True  # so that every batch's pass meets the same linears in the same order

    def embed(self, tokens: torch.Tensor, folder: Path | None = None) -> States:
        """The hidden states that the first block is given, a tensor for each batch."""
        hidden = States(-(-len(tokens) // self.size), folder)
        self.calls = embed(self.model, self.blocks, tokens, self.size, self.device, self.fill, hidden)
        return hidden

    def at(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.prefix}{index}."

    def own(self, index: int) -> dict[str, LayerSpec]:
        """The schemes of a block's weights."""
        at = self.at(index)
        return {name: scheme for name, scheme in self.schemes.items() if name.startswith(at)}

    def runner(self, index: int) -> Runner:
        return Runner(self.blocks[index], self.calls[index], self.device)

    def put_back(self, index: int, ready: Mapping[str, Weight | torch.Tensor]) -> None:
        """Give a filled block what was made of it."""
        import torch

        block, at = self.blocks[index], self.at(index)
        for name, value in ready.items():
            local = name.removeprefix(at)
            if isinstance(value, torch.Tensor):
                set_tensor(block, local, value)
            else:
                install(block.get_submodule(local.removesuffix(".weight")), value)


class Elsewhere(Protocol):
    def quantize(self, index: int, at: str, hidden: States) -> BlockResult:
        """Quantize a block, whose tensors' names begin with `at`, and replace `hidden` by its output, in place."""
        ...

    def advance(self, index: int, ready: Mapping[str, Weight | torch.Tensor], hidden: States) -> None:
        """Replace `hidden` by the output of a block that was finished before, of which `ready` was made."""
        ...


def _run(
    decoder: Decoder,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    method: Method,
    done: Callable[[int], Mapping[str, Weight | torch.Tensor] | None],
    waiting: int,
    folder: Path | None,
    elsewhere: Elsewhere | None,
    options: dict[str, Any],
) -> Iterator[BlockResult]:
    source = decoder.source
    side_by_side = waiting_bytes(source, schemes, tokens.numel(), decoder.dtype.itemsize) <= waiting
    hidden = decoder.embed(tokens, folder)
    for index, block in enumerate(decoder.blocks):
        at, own, ready = decoder.at(index), decoder.own(index), done(index)
        for name in own:
            if ready is not None and name not in ready:
                raise QkitError(f"the finished part of block {index} lacks {name}", "use --restart")
        result = BlockResult(index)
        if elsewhere is not None:
            if own and ready is None:
                result = elsewhere.quantize(index, at, hidden)
            else:
                elsewhere.advance(index, ready or {}, hidden)
            yield result
            continue
        decoder.fill(at[:-1])
        runner = decoder.runner(index)
        if own and ready is None:
            result = Block(runner, index, at, source, own, method, options, folder).quantize(hidden, side_by_side)
        else:
            decoder.put_back(index, ready or {})
            runner.advance(hidden)
        skeleton.dematerialize(block)
        yield result


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
