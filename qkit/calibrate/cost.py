"""What running a calibration text through a model takes, block by block: batches, memory, operations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..methods.base import Cost
from ..models.config import positive_int
from .block import EXPERTS_BYTES
from .states import IN_MEMORY
from .statistics import statistic_bytes

if TYPE_CHECKING:
    from ..methods import Method
    from ..sources.types import Source

# Bytes of a batch's widest activation. Small enough to stay in the caches, and that malloc uses its memory again: glibc
# gives pieces of 32 MiB and more back to the system at once, and a fresh page costs more than the arithmetic on it.
BATCH_BYTES = 8 << 20
# Up to these bytes of activations wait while the batches go through a block side by side; above, every stage takes a
# (partial) pass of its own, with the same result.
WAITING_BYTES = 4 << 30
# Of a forward pass, what the partial passes of all stages take beside the last, whole one: that of o_proj runs
# attention, that of the MLP's first linears attention and o_proj, that of its last one nearly everything. Of
# Llama-3-70B that is 1.0 of the products of matrices, and attention three times more.
_PARTIAL = 1.2


@dataclass(frozen=True)
class Calibration(Cost):
    """nbytes: where everything is in one memory. Of a GPU: `device`, what its own holds, and `host`, what is left for
    the machine's; `spread`, what is left of it where other machines calibrate. scratch: bytes on disk while it runs."""

    device: int = 0
    host: int = 0
    spread: int = 0
    scratch: int = 0


def predict_cost(
    source: Source,
    schemes: Collection[str],
    samples: int,
    length: int,
    method: Method,
    waiting: int = WAITING_BYTES,
) -> Calibration:
    """What `quantize_blocks` of the weights in `schemes` will take, with weights, activations and statistics, without
    the interpreter. waiting: as there. Reads no tensor.

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
    one_pass = method.needs is None or method.observes
    waits = waiting_bytes(source, schemes, tokens, 2)
    side_by_side = not one_pass and waits <= waiting
    if not one_pass and not side_by_side:
        forward *= 1 + _PARTIAL
    costs = {
        key: method.cost([(weights[name][0], weights[name][1]) for name in members], reached(members[0]))
        for key, members in groups.items()
    }
    size = batch_size(source, schemes, length, 2)
    hidden = positive_int(config, "hidden_size", max((in_ for _, in_ in groups), default=1))
    states = 2 * tokens * hidden
    held = states if states <= IN_MEMORY else 0
    batch = min(samples, size) * length
    embedding = max((source.meta(name).nbytes for name in weights if name not in schemes), default=0)
    embedding += 2 * 2 * batch * hidden
    passing = waits if side_by_side else held
    working = _working_bytes(source, schemes, groups, costs, batch, method)
    in_block = _block_bytes(source, schemes) + passing + working
    largest = max((source.meta(name).nbytes for name in weights), default=0)
    kept = any(".experts." in name for name in schemes) and not side_by_side and not one_pass
    return Calibration(
        forward + sum(cost.flops for cost in costs.values()),
        max(embedding + held, in_block),
        # A tensor is read here and copied there; what was solved comes back, as codes and in a format's form.
        device=max(embedding, in_block - (0 if side_by_side else held)),
        host=held + 2 * largest,
        spread=max(embedding + held, held + 2 * largest + _block_bytes(source, schemes) // 2),
        scratch=(states - held) * (2 if kept else 1),
    )


def _block_bytes(source: Source, schemes: Collection[str]) -> int:
    """The largest block's weights."""
    per_block: dict[str, int] = {}
    for name in schemes:
        head, _, tail = name.partition("layers.")
        key = head + tail.partition(".")[0]
        per_block[key] = per_block.get(key, 0) + source.meta(name).nbytes
    return max(per_block.values(), default=0)


def _working_bytes(
    source: Source,
    schemes: Collection[str],
    groups: Mapping[tuple[str, int], list[str]],
    costs: Mapping[tuple[str, int], Cost],
    batch: int,
    method: Method,
) -> int:
    """Of one batch of tokens in a block, or of what is solved there, whichever takes more."""
    gated = 3 * 2 * batch * max((source.meta(name).shape[0] for name in schemes), default=0)
    most = gated
    for (_, in_), cost in costs.items():
        most = max(most, cost.nbytes + 2 * batch * in_)
    if method.needs is not None:
        # The statistics of several experts, while a batch is run.
        of_experts: dict[str, int] = {}
        for (parent, in_), members in groups.items():
            if ".experts." in members[0]:
                stem = f"{parent.rpartition('.')[0]} {in_}"
                of_experts[stem] = of_experts.get(stem, 0) + statistic_bytes(method.needs, in_)
        largest = max((statistic_bytes(method.needs, in_) for _, in_ in groups), default=0)
        most = max(most, gated + max([largest, *(min(n, max(EXPERTS_BYTES, largest)) for n in of_experts.values())]))
    return most


def waiting_bytes(source: Source, schemes: Collection[str], tokens: int, itemsize: int) -> int:
    """What is alive where `tokens` wait in a block: the states it was given, those it adds to, and a layer's input."""
    hidden = positive_int(source.config, "hidden_size", 0)
    return tokens * (2 * hidden + max((source.meta(name).shape[1] for name in schemes), default=0)) * itemsize


def batch_size(source: Source, names: Iterable[str], length: int, itemsize: int) -> int:
    widest = max((max(source.meta(name).shape) for name in names), default=1)
    return max(1, BATCH_BYTES // (length * widest * itemsize))
