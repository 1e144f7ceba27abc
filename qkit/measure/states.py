"""A model's last hidden states, before its final norm and head, and the logits that its head makes of them again.

Hidden states of all tokens are a few thousand values each where logits are a hundred thousand: the states of a baseline
are kept while one model after another is compared with it, and its logits are made anew, chunk by chunk, bit for bit
what its own forward gives.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..calibrate.states import States

if TYPE_CHECKING:
    import torch


def of_loaded(model: Any, tokens: torch.Tensor, advance: Any = lambda amount: None) -> States:
    """What the last decoder block of a loaded model gives for tokens int64 [chunks, n_ctx]."""
    import torch

    from ..models.experts import decoder_of

    decoder = decoder_of(model)
    found = States(len(tokens))

    def see(block: Any, given: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handle = decoder.layers[-1].register_forward_hook(see)
    try:
        with torch.inference_mode():
            for chunk in tokens:
                decoder(input_ids=chunk.to(model.device).unsqueeze(0), use_cache=False)
                advance(1)
    finally:
        handle.remove()
    return found


def logits(model: Any, states: States, device: Any) -> Generator[torch.Tensor, None, None]:
    """[n_ctx, vocab] for each chunk. Of the model, only what comes after the blocks needs weights, on `device`."""
    import torch

    from ..models.experts import decoder_of

    blocks = decoder_of(model).layers
    for i in range(len(states)):
        # The model's own forward around blocks that hand on what they are given: final norm, head, scaling and
        # soft-capping of logits are as this architecture has them.
        given = states[i].to(device)
        with torch.inference_mode(), _passing(blocks, given):
            found = model(inputs_embeds=given, use_cache=False).logits[0]
        yield found


@contextmanager
def _passing(blocks: Any, states: torch.Tensor) -> Iterator[None]:
    """While entered, each block gives `states`, whatever it is given (Gemma scales its embeddings before)."""
    for block in blocks:
        block.forward = lambda *args, **kwargs: states
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
