"""Run a calibration text through a model one decoder block at a time, quantizing each linear as it is reached.

Only one block's weights are in memory. Hidden states are carried from block to block, and within a block from layer
to layer, through what is already quantized: o_proj is fitted to what the quantized q, k and v produce.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..methods.base import Cost
from ..models import skeleton
from ..models.config import positive_int
from .block import Batches, Block, BlockResult, Runner, install, set_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.weight import Weight
    from ..methods import Method
    from ..sources.types import Source
    from ..spec import LayerSpec

# Bytes of a batch's widest activation. Small enough to stay in the caches, and that malloc uses its memory again: glibc
# gives pieces of 32 MiB and more back to the system at once, and a fresh page costs more than the arithmetic on it.
_BATCH_BYTES = 8 << 20
# Up to these bytes of activations wait while the batches go through a block side by side; above, every stage takes a
# (partial) pass of its own. Constants, not the free memory: the batches decide the order of additions, and results must
# not depend on the machine's load.
_WAITING_BYTES = 4 << 30


def quantize_blocks(
    source: Source,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    method: Method,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    done: Callable[[int], Mapping[str, Weight | torch.Tensor] | None] = lambda index: None,
    **options: Any,
) -> Iterator[BlockResult]:
    """Quantize the weights in `schemes` with `method`; yields one BlockResult per decoder block, in order.

    schemes   weight name -> LayerSpec; each must be an nn.Linear of a decoder block
    tokens    int64 [samples, length]; no padding
    dtype     of the forward pass, bfloat16 by default; weights are quantized from what the source holds
    done      tensors of blocks finished earlier by name, quantized and replaced ones, or None; results are then
              bit-identical to an uninterrupted run
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
    return torch.no_grad()(_run)(model, source, schemes, tokens, method, device, dtype, done, options)


def _run(
    model: nn.Module,
    source: Source,
    schemes: Mapping[str, LayerSpec],
    tokens: torch.Tensor,
    method: Method,
    device: str,
    dtype: torch.dtype,
    done: Callable[[int], Mapping[str, Weight | torch.Tensor] | None],
    options: dict[str, Any],
) -> Iterator[BlockResult]:
    from ..models.experts import Experts

    prefix, blocks = decoder_blocks(model)
    size = batch_size(source, schemes, tokens.shape[1], dtype.itemsize)
    side_by_side = _waiting_bytes(source, schemes, tokens.numel(), dtype.itemsize) <= _WAITING_BYTES
    for module in model.modules():
        if isinstance(module, Experts):
            module.call_all = True  # so that every batch's pass meets the same linears in the same order
    hidden: list[torch.Tensor] = []
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
            result = Block(runner, index, at, source, own, method, options).quantize(hidden, side_by_side)
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


def predict_cost(source: Source, schemes: Collection[str], samples: int, length: int, method: Method) -> Cost:
    """What `quantize_blocks` of the weights in `schemes` will take, with weights, activations and statistics, without
    the interpreter. Reads no tensor.

    Every weight counts as its own input group except those with a sibling of the same parent and width, which
    share one: q, k, v; gate, up."""
    tokens = samples * length
    weights = {name: source.meta(name).shape for name in source.names() if len(source.meta(name).shape) == 2}
    groups: dict[tuple[str, int], list[str]] = {}
    for name in schemes:
        groups.setdefault((name.rsplit(".", 2)[0], weights[name][1]), []).append(name)
    config = source.config
    experts = positive_int(config, "num_local_experts", positive_int(config, "num_experts", 1))
    share = min(1.0, positive_int(config, "num_experts_per_tok", 1) / experts)

    def reached(name: str) -> float:
        return tokens * share if ".experts." in name else tokens

    forward = sum(2.0 * reached(name) * weights[name][0] * weights[name][1] for name in schemes)
    if _waiting_bytes(source, schemes, tokens, 2) > _WAITING_BYTES:
        forward *= 2.5  # partial passes per stage
    size = batch_size(source, schemes, length, 2)
    costs = [
        method.cost([(weights[name][0], weights[name][1]) for name in members], reached(members[0]))
        for members in groups.values()
    ]
    return Cost(
        forward + sum(cost.flops for cost in costs),
        _peak(source, weights, schemes, tokens, min(samples, size) * length, groups, costs),
    )


def _peak(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    schemes: Collection[str],
    tokens: int,
    batch: int,
    groups: Mapping[tuple[str, int], list[str]],
    costs: Sequence[Cost],
) -> int:
    """Bytes alive at once beside the process itself. shapes: of all matrices; tokens: of all windows; batch: of one
    pass."""
    hidden = positive_int(source.config, "hidden_size", max((in_ for _, in_ in groups), default=1))
    states = 2 * tokens * hidden
    waiting = _waiting_bytes(source, schemes, tokens, 2)
    passing = waiting if waiting <= _WAITING_BYTES else states
    per_block: dict[str, int] = {}
    for name in schemes:
        head, _, tail = name.partition("layers.")
        key = head + tail.partition(".")[0]
        per_block[key] = per_block.get(key, 0) + source.meta(name).nbytes
    gated = 3 * 2 * batch * max((shapes[name][0] for name in schemes), default=0)
    solving = (cost.nbytes + 2 * batch * in_ for (_, in_), cost in zip(groups, costs, strict=True))
    embedding = max((source.meta(name).nbytes for name in shapes if name not in schemes), default=0)
    return max(embedding + 2 * states, max(per_block.values(), default=0) + passing + max(gated, *solving, 0))


def _waiting_bytes(source: Source, schemes: Collection[str], tokens: int, itemsize: int) -> int:
    """What is alive where `tokens` wait in a block: the states it was given, those it adds to, and a layer's input."""
    hidden = positive_int(source.config, "hidden_size", 0)
    return tokens * (2 * hidden + max((source.meta(name).shape[1] for name in schemes), default=0)) * itemsize


def batch_size(source: Source, names: Iterable[str], length: int, itemsize: int) -> int:
    widest = max((max(source.meta(name).shape) for name in names), default=1)
    return max(1, _BATCH_BYTES // (length * widest * itemsize))


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
    hidden: Batches,
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
                hidden.append(states.to("cpu", copy=True))
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
