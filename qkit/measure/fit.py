"""Whether a profile can run in the memory that is free: by formula, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..models.config import positive_int, text_config
from ..models.skeleton import check_architecture
from ..spec.dtypes import FLOATS
from . import memory, speed

if TYPE_CHECKING:
    from ..hardware.detect import LocalDevice
    from ..sources.types import Source

_ITEMSIZE = {"float32": 4, "fp32": 4}  # of the types a model runs in; the others have 2 bytes


@dataclass(frozen=True)
class Sizes:
    """What decides a model's memory: its parsed config, bytes of a value as it runs, of its weights, its limits.

    max_tokens  the most that its config says it takes; None where it says nothing
    """

    label: str
    config: Any
    itemsize: int
    weights: int
    vocab: int
    max_tokens: int | None

    def kv(self, tokens: int, batch: int) -> tuple[int, str]:
        """(bytes of the KV cache, the formula with its numbers)."""
        return memory.kv_formula(self.config, tokens, batch, self.itemsize)


def sizes(source: Source) -> Sizes:
    """From config.json and the headers. Raises QkitError for an architecture that cannot run."""
    from transformers import CONFIG_MAPPING

    given = {k: v for k, v in source.config.items() if k != "quantization_config"}
    kind = check_architecture(given)
    try:
        config = CONFIG_MAPPING[kind].from_dict(given)
    except Exception as error:  # transformers' validators raise classes of their own
        hint = "check the values in config.json"
        raise QkitError(f"transformers refuses the config of {source.label}: {error}", hint) from error
    itemsize = _ITEMSIZE.get(str(given.get("dtype") or given.get("torch_dtype")), 2)
    metas = [source.meta(name) for name in source.names()]
    # Plain tensors are cast to the type that the model runs in; codes and small floats stay as they are.
    weights = sum(m.numel * itemsize if m.dtype in FLOATS else m.nbytes for m in metas)
    most = positive_int(text_config(given), "max_position_embeddings", 0) or None
    return Sizes(source.label, config, itemsize, weights, config.get_text_config().vocab_size, most)


def check(models: Sequence[Sizes], where: LocalDevice, context: int, batch: int, n_ctx: int) -> None:
    """Refuse what does not fit the free memory: the weights of all models, which are compared side by side, and of
    one at a time the KV cache and logits of `batch` sequences of `context` tokens and what is generated after them, or
    the logits of scoring chunks of n_ctx tokens.

    Raises QkitError that names the largest batch and the largest context that fit."""
    free = where.available_bytes
    weights = sum(m.weights for m in models)
    names = " and ".join(m.label for m in models)

    def cache(tokens: int, sequences: int) -> int:
        return max(m.kv(_length(m, tokens), sequences)[0] for m in models)

    def logits(sequences: int) -> int:
        # Of the last position; generate adds two float32 copies: one of its own, and one for a processor of scores.
        return max(sequences * m.vocab * (m.itemsize + 8) for m in models)

    scoring = sum(n_ctx * m.vocab * m.itemsize for m in models)

    def fits(tokens: int, sequences: int) -> bool:
        return weights + max(scoring, cache(tokens, sequences) + logits(sequences)) <= free

    if fits(context, batch):
        return
    if weights + scoring > free:
        raise QkitError(
            f"{names} needs {units.size(weights)} for weights and {units.size(scoring)} for the logits of "
            f"{n_ctx} tokens; {where.id} has {units.size(free)} free",
            "use a smaller model, a device with more memory" + (", or no baseline" if len(models) > 1 else ""),
        )
    remedies = [
        f"the largest {name} that fits {at} is {most}"
        for name, at, most in (
            ("--batch", f"at --context {context}", _largest(lambda n: fits(context, n), batch, 1)),
            ("--context", f"at --batch {batch}", _largest(lambda n: fits(n, batch), context, 8)),
        )
        if most
    ]
    least = f"not even --batch 1 at --context {context} or --batch {batch} at --context 8 fits"
    raise QkitError(
        f"{names} at --batch {batch} and --context {context} needs {units.size(weights)} for weights, "
        f"{units.size(cache(context, batch))} for the KV cache and {units.size(logits(batch))} for logits; "
        f"{where.id} has {units.size(free)} free",
        "; ".join(remedies) or least,
    )


def _length(model: Sizes, context: int) -> int:
    """Tokens in the cache at the end of a timed run."""
    length = context + speed.GENERATED
    return min(length, model.max_tokens) if model.max_tokens else length


def _largest(fits: Callable[[int], bool], too_many: int, least: int) -> int | None:
    """The largest n in [least, too_many) that fits, where every smaller one does too; None where there is none."""
    if least >= too_many or not fits(least):
        return None
    low, high = least, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
