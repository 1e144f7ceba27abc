"""Models whose caches differ, what is done to a cache, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WINDOW = 16
KINDS: dict[str, dict[str, Any]] = {
    "full": {"family": "llama"},
    "sliding": {"family": "gemma3_text", "sliding_window": WINDOW},
    "mixed": {
        "family": "gemma3_text",
        "sliding_window": WINDOW,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recomputed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, -1].float()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm() / b.norm()) < 0.03


def described(cache: Any) -> list[Any]:
    """What a cache says of itself."""
    each = range(len(cache))
    return [
        repr(cache), len(cache), cache.is_initialized, cache.is_sliding, cache.is_compileable, cache.is_croppable,
        [cache.get_seq_length(i) for i in each], [cache.get_mask_sizes(n, i) for i in each for n in (1, 4)],
        [cache.get_max_length(i) for i in each], [cache.is_recording_past(i) for i in each],
        [(keys.shape, values.shape, None if window is None else window.item()) for keys, values, window in cache],
        [(layer.get_seq_length(), layer.is_initialized, hasattr(layer, "cumulative_length")) for layer in cache.layers],
    ]  # fmt: skip


def offloaded(cache: Any) -> None:
    for i in range(len(cache)):
        cache.offload(i, only_non_sliding=False)
        cache.layers[i].prefetch()


def assigned(cache: Any) -> None:
    for layer in cache.layers:
        layer.values = layer.values.clone()


# What is called -> which rows of the text the cache is of afterwards
IN_PLACE: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "reorder to one": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "no crop": (lambda cache: None if any(cache.is_sliding) else cache.crop(0), [0, 1]),
    "offload": (offloaded, [0, 1]),
    "assigned": (assigned, [0, 1]),
    "one layer assigned": (lambda cache: setattr(cache.layers[1], "keys", cache.layers[1].keys + 0), [0, 1]),
}
