"""A checkpoint with the values and names that a GGUF file of it has: what is read, quantized and verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from ...errors import QkitError
from ...models.config import positive_int
from ...models.families import TOWERS
from ...sources.gguf.slots import ROPE_FREQS, Slot, slots
from ...sources.types import ROWS, Rows, Source, Wrapped
from ...spec.dtypes import TensorMeta
from ...storage.files import first_few, natural_key
from .metadata import Model, model_of, rope_factors
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

_HEAD = "lm_head.weight"
# Computed from the config by whoever runs the model.
_BUFFERS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")


class GgufView(Wrapped):
    """`types.Source`. Rows of Q and K are in ggml's order, Gemma's norms one higher, vectors and routers float32; rows
    of Gemma's embedding beyond the vocabulary are left out.

    Raises QkitError on opening where the model has no place in a GGUF file."""

    def __init__(self, source: Source):
        super().__init__(source)
        self.model: Model = model_of(source.config)
        self.vocabulary = Vocabulary(source)
        self._stem = _stem(source)
        names = set(source.names())
        config = dict(self.model.config)
        config["tie_word_embeddings"] = self._find(_HEAD, names) is None
        self.tied: bool = config["tie_word_embeddings"]
        self._slots: dict[str, Slot] = {}
        counts = ("num_hidden_layers", *(("num_experts", "num_local_experts") if self.model.arch.experts else ()))
        for what in counts:  # before as many are listed
            if positive_int(config, what, 1) > len(names):
                raise QkitError(f"{self.label}: {what} is {config[what]}, and there are {len(names)} tensors")
        missing = []
        for name, slot in slots(self.model.arch, config, None):
            found = self._find(name, names)
            if found is None:
                missing.append(name)
            else:
                self._slots[found] = slot
        if missing:
            raise QkitError(
                f"{self.label}: {len(missing)} tensors are missing: {first_few(sorted(missing, key=natural_key))}",
                "the checkpoint is incomplete, or its config is not its own",
            )
        unused = sorted(names - self._slots.keys(), key=natural_key)
        self.left_out = [name for name in unused if not name.endswith(_BUFFERS)]
        strange = [n for n in self.left_out if not TOWERS.search(n)]
        if strange:
            raise QkitError(
                f"{self.label}: {len(strange)} tensors have no place in a GGUF file: {first_few(strange)}",
                "this variant of the architecture is not known here; leaving them out would change the model",
            )
        self._factors = rope_factors(self.model)
        if self._factors is not None:
            self._slots["rope_freqs.weight"] = Slot(ROPE_FREQS, (len(self._factors),))
        for name in self._slots:
            self._check_shape(name)
        self._holds(self._slots)

    def _find(self, name: str, names: set[str]) -> str | None:
        """A tensor's name in the checkpoint: multimodal ones have the text model one level deeper."""
        head, _, rest = name.partition("model.")
        candidates = [name, self._stem + rest] if not head else [name, f"language_model.{name}", f"model.{name}"]
        return next((c for c in candidates if c in names), None)

    def _check_shape(self, name: str) -> None:
        slot = self._slots[name]
        if name == "rope_freqs.weight":
            return
        meta = self.source.meta(name)
        padded = (
            slot.gguf in ("token_embd.weight", "output.weight") and len(meta.shape) == 2
        )  # rows beyond the vocabulary
        if meta.shape != slot.shape and not (padded and meta.shape[1] == slot.shape[1]):
            raise QkitError(
                f"{self.label}: {name} has the shape {list(meta.shape)}, the config says {list(slot.shape)}"
            )

    @cached_property
    def embedded(self) -> int:
        """Of the embedding as it is written."""
        embedding = next(name for name, slot in self._slots.items() if slot.gguf == "token_embd.weight")
        stored = self.source.meta(embedding).shape[0]
        return min(stored, self.vocabulary.size) if self.model.arch.gemma else stored

    @cached_property
    def places(self) -> Mapping[str, str]:
        """Tensor name -> its name in the file; experts of a matrix have one."""
        return {name: slot.gguf for name, slot in self._slots.items()}

    def meta(self, name: str) -> TensorMeta:
        slot = self._slots[name]
        if name == "rope_freqs.weight":
            return TensorMeta("F32", slot.shape)
        meta = self.source.meta(name)
        if slot.gguf in ("token_embd.weight", "output.weight"):
            meta = replace(meta, shape=(min(meta.shape[0], self.embedded), *meta.shape[1:]))
        if len(meta.shape) == 1 or "ffn_gate_inp" in slot.gguf:
            meta = TensorMeta("F32", meta.shape if meta.shape[0] > 1 else meta.shape[1:])
        return meta

    def read(self, name: str) -> torch.Tensor:
        import torch

        from ...spec.dtypes import torch_dtype

        slot, meta = self._slots[name], self.meta(name)
        if name == "rope_freqs.weight":
            return torch.tensor(self._factors, dtype=torch.float32)
        tensor = self.source.read(name)
        if tensor.dim() > len(meta.shape):  # one row: a vector to ggml
            tensor = tensor[0]
        elif tensor.shape[0] != meta.shape[0]:
            tensor = tensor[: meta.shape[0]].clone()
        if slot.minus_one:
            return tensor.float() + 1
        if slot.heads:
            tensor = _interleaved(tensor, slot.heads)
        return tensor.to(torch_dtype(meta.dtype))

    def rows(self, name: str) -> Rows | None:
        from ...spec.dtypes import torch_dtype

        slot, meta = self._slots[name], self.meta(name)
        if len(meta.shape) != 2 or slot.minus_one or self.source.meta(name).shape[1:] != meta.shape[1:]:
            return None
        found, dtype = self.source.rows(name), torch_dtype(meta.dtype)
        head = meta.shape[0] // slot.heads if slot.heads else 1
        if found is None or ROWS % head:
            return None

        def read(start: int, stop: int) -> torch.Tensor:
            tensor = found(start, stop)
            return (_interleaved(tensor, tensor.shape[0] // head) if slot.heads else tensor).to(dtype)

        return read


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of so many heads: transformers rotates i and i + half of the head, ggml neighbours (2i, 2i + 1)."""
    split = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape).contiguous()


def _stem(source: Source) -> str:
    """What the names of the text model's tensors begin with."""
    found = next((n for n in source.names() if n.endswith("embed_tokens.weight")), "model.embed_tokens.weight")
    return found.removesuffix("embed_tokens.weight")
