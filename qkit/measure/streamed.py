"""A checkpoint run over the evaluation text one decoder block at a time: memory holds one block, or what comes before
and after them, beside hidden states. The figures are those of the loaded model, bit for bit: the same modules and
kernels get the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from ..calibrate.states import States
from ..hardware import memory as process
from . import memory
from .states import logits

if TYPE_CHECKING:
    import torch

    from ..runtime.frame import Frame


class Streamed:
    """states: what the last block gives, for each chunk; weights: bytes of the model's tensors as it would hold them;
    kernels: kernel name -> quantized linears that use it. The last two of what has been run so far."""

    def __init__(self, frame: Frame, states: States | None = None):
        """states: where they are known already, and `run` is not called."""
        from ..calibrate.blocks import around, decoder_blocks

        self.frame = frame
        self._states = states
        self._parts: dict[str, memory.Weights] = {}
        self._kernels: dict[str, Counter[str]] = {}
        model = frame.model
        self._stem, self._blocks = decoder_blocks(model)
        decoder, outside = around(model, self._blocks)
        embedding = model.get_input_embeddings()
        self._after = [name for name in outside if model.get_submodule(name) is not embedding]
        self._after += [
            name for name, child in model.named_children() if all(m is not decoder for m in child.modules())
        ]

    def run(self, tokens: torch.Tensor, advance: Callable[[float], None] = lambda amount: None) -> Streamed:
        """Take tokens int64 [chunks, n_ctx] through all blocks; advance(1) is called after each.

        Raises QkitError for a tensor that cannot be read."""
        import torch

        from ..calibrate.block import Runner
        from ..calibrate.blocks import embed

        states, device = States(len(tokens)), str(self.frame.device)
        with torch.inference_mode():
            calls = embed(self.frame.model, self._blocks, tokens, 1, device, self._fill, states)
            for index, block in enumerate(self._blocks):
                name = f"{self._stem}{index}"
                self._fill(name)
                Runner(block, calls[index], device).advance(states)
                self._weigh(name)
                self.frame.empty(name)
                process.give_back()
                advance(1)
        self._states = states
        return self

    def logits(self) -> Generator[torch.Tensor, None, None]:
        """[n_ctx, vocab] for each chunk, in order; can be asked for again."""
        assert self._states is not None
        for name in self._after:
            self._fill(name)
        try:
            yield from logits(self.frame.model, self._states, self.frame.device)
        finally:
            for name in self._after:
                self._weigh(name)
                self.frame.empty(name)
            process.give_back()

    @property
    def kernels(self) -> Counter[str]:
        return sum(self._kernels.values(), Counter())

    @property
    def weights(self) -> memory.Weights:
        return sum(self._parts.values(), memory.Weights(0, 0, 0))

    def _fill(self, name: str) -> None:
        self._kernels[name] = self.frame.fill(name)
        self._weigh(name)

    def _weigh(self, name: str) -> None:
        """What a module holds now: kernels change layouts when they are chosen."""
        if not self.frame.is_tied(name):
            modules = self.frame.model.get_submodule(name).modules()
            self._parts[name] = memory.weights_of(modules, self.frame.model.get_input_embeddings())
