"""A model's last hidden states, before its final norm and head, and the logits that its head makes of them again.

Hidden states of all tokens are a few thousand values each where logits are a hundred thousand: the states of a baseline
are kept while one model after another is compared with it, and its logits are made anew, chunk by chunk, bit for bit
what its own forward gives.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError

if TYPE_CHECKING:
    import torch

IN_MEMORY = 256 << 20  # bytes of states; more of them go to a temporary file


class States:
    """[1, n_ctx, hidden] for each of `chunks` chunks of text, on the CPU or in a file without a name that is gone with
    this object; all of one shape and type."""

    def __init__(self, chunks: int):
        self._chunks, self._filled = chunks, 0
        self._data: torch.Tensor | None = None

    def append(self, states: torch.Tensor) -> None:
        """Raises QkitError where there is no room on disk."""
        if self._data is None:
            self._data = _room((self._chunks, *states.shape), states.dtype)
        self._filled += 1
        self[self._filled - 1] = states

    def __len__(self) -> int:
        return self._filled

    def __getitem__(self, index: int) -> torch.Tensor:
        assert self._data is not None
        return self._data[: self._filled][index]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        self[index].copy_(states)


def _room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    import torch

    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if nbytes <= IN_MEMORY:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        with tempfile.TemporaryFile() as file:
            # Room is taken now: where a mapped file meets a full disk later, the process is killed.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise QkitError(
            f"{units.size(nbytes)} of hidden states have no room in {tempfile.gettempdir()}: {error.strerror}",
            "set TMPDIR to a folder on a larger disk",
        ) from error
    return torch.frombuffer(mapped, dtype=torch.uint8).view(dtype).view(tuple(shape))


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
