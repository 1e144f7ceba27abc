"""A GGUF file as a transformers checkpoint: names, shapes and values of the tensors as transformers has them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec.dtypes import TensorMeta, torch_dtype
from ...storage.files import first_few, natural_key
from ..types import CARD_KEYS, Sidecar, Stored
from . import tokenizer as gguf_tokenizer
from .config import Arch, Keys, build_config, find_arch
from .file import GgufFile
from .ggml import require_readable
from .rope import rope_config

if TYPE_CHECKING:
    import torch

_DTYPES = ("BF16", "F16", "F32")
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Slot:
    """One tensor of the transformers model and where it comes from.

    heads      rows are in ggml's RoPE order for that many heads; 0: as they are
    minus_one  stored as weight + 1
    expert     slice of the first dimension of the GGUF tensor
    """

    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    minus_one: bool = False
    expert: int | None = None


class GgufSource:
    """`types.Source` over a GGUF file; every tensor is dequantized as it is read. Thread-safe.

    dtype: of every tensor; None: floats as they are stored, quantized ones as bfloat16 (rounded once, by at most 2**-9
    of each value).

    Raises QkitError on opening as `gguf.open_gguf` says.
    """

    def __init__(self, file: GgufFile, base_model: str | None = None, dtype: str | None = None):
        if dtype is not None and dtype not in _DTYPES:
            raise QkitError(f"tensors cannot be read as {dtype!r}", f"use {', '.join(_DTYPES)}")
        self._file, self._dtype = file, dtype
        self.label = str(file.path)
        name, arch = find_arch(file.metadata, file.path)
        self.config = self._config(name, arch)
        self._slots = dict(sorted(_slots(arch, self.config, file), key=lambda item: natural_key(item[0])))
        self._check()
        gguf_tokenizer.check(file.metadata, name, self.config["vocab_size"], file.path)
        self.base_model = base_model or _base_model(file)
        self.folder: Path | None = None
        facts = {key: file.metadata.get(f"general.{key.replace('_', '.')}") for key in CARD_KEYS}
        self.metadata: dict[str, Any] = {key: value for key, value in facts.items() if isinstance(value, str) and value}
        infos = file.tensors.values()
        types = Counter(info.type.name for info in infos)
        quantized = any(info.type.plain is None for info in infos)
        self.stored = Stored(sum(info.nbytes for info in infos), dict(types), quantized)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._file.fingerprint()} {self._dtype}".encode()).hexdigest()

    def names(self) -> list[str]:
        """Tensor names in natural order."""
        return list(self._slots)

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape that `read` returns; KeyError for an unknown name."""
        slot = self._slots[name]
        stored = self._file.tensors[slot.gguf].type.plain
        # What is stored as floats of 16 or 32 bits stays as it is: bfloat16 cannot hold all of them.
        own = stored if stored in _DTYPES else "F32" if stored == "F64" else "BF16"
        return TensorMeta(self._dtype or own, slot.shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantized: float32 arithmetic, rounded once. Raises QkitError if the file changed."""
        import torch

        slot, dtype = self._slots[name], torch_dtype(self.meta(name).dtype)
        if slot.minus_one:
            return (self._file.read(slot.gguf, torch.float32) - 1).to(dtype).reshape(slot.shape)
        tensor = self._file.read(slot.gguf, dtype, slot.expert).view(slot.shape)
        if slot.heads:
            # ggml rotates neighbours (2i, 2i + 1), transformers i and i + half of the head.
            split = tensor.view(slot.heads, -1, 2, *slot.shape[1:])
            tensor = split.transpose(1, 2).reshape(slot.shape).contiguous()
        return tensor

    @cached_property
    def sidecars(self) -> tuple[Sidecar, ...]:
        """Tokenizer, chat template and generation defaults; built on first use (a second or two for 262k tokens)."""
        return gguf_tokenizer.build(self._file.metadata, self.config, self._file.path)

    def _config(self, name: str, arch: Arch) -> dict[str, Any]:
        import torch

        file = self._file
        keys = Keys(file.metadata, name, file.path)
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise QkitError(f"{file.path}: there is no token embedding (token_embd.weight)")
        config = build_config(keys, arch, file.tensors, embedding.shape[0], self._dtype or "BF16")
        factors = None
        if _ROPE_FREQS in file.tensors:
            require_readable(file.tensors[_ROPE_FREQS].type, _ROPE_FREQS)
            factors = file.read(_ROPE_FREQS, torch.float32).flatten().tolist()
        return config | rope_config(keys, arch, config["head_dim"], factors)

    def _check(self) -> None:
        """Every tensor the model needs is there, has its shape and a readable type, and none is left over."""
        path, tensors = self._file.path, self._file.tensors
        missing = [slot.gguf for slot in self._slots.values() if slot.gguf not in tensors]
        if missing:
            raise QkitError(
                f"{path}: {len(missing)} tensors are missing: {first_few(sorted(set(missing), key=natural_key))}",
                "the file is incomplete or of another model than it says: fetch it again",
            )
        extra = sorted(tensors.keys() - {slot.gguf for slot in self._slots.values()} - {_ROPE_FREQS}, key=natural_key)
        if extra:
            raise QkitError(
                f"{path}: {len(extra)} tensors have no place in {self.config['architectures'][0]}: {first_few(extra)}",
                "qkit does not know this variant of the architecture; leaving them out would change the model",
            )
        for slot in self._slots.values():
            info = tensors[slot.gguf]
            require_readable(info.type, slot.gguf)
            shape = info.shape if slot.expert is None else info.shape[1:]
            # A vector may be stored where transformers has a [1, n] matrix.
            if shape != slot.shape and (1, *shape) != slot.shape:
                expected = list(slot.shape)
                raise QkitError(f"{path}: tensor {slot.gguf} has the shape {list(shape)}, the metadata says {expected}")
            if slot.expert is not None and slot.expert >= info.shape[0]:
                raise QkitError(f"{path}: tensor {slot.gguf} holds {info.shape[0]} experts, the metadata says more")


def _base_model(file: GgufFile) -> str:
    """What the file calls its model: a Hub id where it names one, else its name."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        value = file.metadata.get(key)
        if isinstance(value, str) and value:
            return value.removeprefix("https://huggingface.co/").rstrip("/")
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else file.path.stem


def _slots(arch: Arch, config: dict[str, Any], file: GgufFile) -> Iterator[tuple[str, Slot]]:
    """(transformers name, Slot) of every tensor the model has."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", Slot("token_embd.weight", (vocab, hidden))
    yield "model.norm.weight", Slot("output_norm.weight", (hidden,), minus_one=arch.gemma)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", Slot("output.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        if block + "attn_norm.weight" not in file.tensors:
            # Stops a bogus block_count at the first missing layer.
            yield layer + "input_layernorm.weight", Slot(block + "attn_norm.weight", (hidden,))
            return
        for ours, slot in _norms(arch, config):
            yield layer + ours, Slot(block + slot.gguf, slot.shape, minus_one=arch.gemma)
        for ours, slot in _attention(arch, config):
            yield f"{layer}self_attn.{ours}", Slot(block + slot.gguf, slot.shape, slot.heads, slot.minus_one)
        feed_forward = _experts(arch, config, block, file) if arch.experts else _mlp(config)
        for ours, slot in feed_forward:
            yield layer + ours, Slot(block + slot.gguf, slot.shape, expert=slot.expert)


def _norms(arch: Arch, config: dict[str, Any]) -> Iterator[tuple[str, Slot]]:
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if arch.gemma:
        names |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    for ours, gguf in names.items():
        yield f"{ours}.weight", Slot(f"{gguf}.weight", (config["hidden_size"],))


def _attention(arch: Arch, config: dict[str, Any]) -> Iterator[tuple[str, Slot]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv_bias = config.get("attention_bias", arch.model_type.startswith("qwen2"))
    for name, count, permuted in (("q", heads, True), ("k", kv_heads, True), ("v", kv_heads, False)):
        order = count if permuted and arch.permuted else 0
        yield f"{name}_proj.weight", Slot(f"attn_{name}.weight", (count * dim, hidden), order)
        if qkv_bias:
            yield f"{name}_proj.bias", Slot(f"attn_{name}.bias", (count * dim,), order)
    yield "o_proj.weight", Slot("attn_output.weight", (hidden, heads * dim))
    if config.get("attention_bias"):
        yield "o_proj.bias", Slot("attn_output.bias", (hidden,))
    if arch.qk_norm:
        for name in "qk":
            yield f"{name}_norm.weight", Slot(f"attn_{name}_norm.weight", (dim,), minus_one=arch.gemma)


def _mlp(config: dict[str, Any]) -> Iterator[tuple[str, Slot]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield f"mlp.{name}_proj.weight", Slot(f"ffn_{name}.weight", shape)
        if config.get("mlp_bias"):
            yield f"mlp.{name}_proj.bias", Slot(f"ffn_{name}.bias", shape[:1])


def _experts(arch: Arch, config: dict[str, Any], block: str, file: GgufFile) -> Iterator[tuple[str, Slot]]:
    """Router and experts. Files hold all experts of a layer in one tensor, old Mixtral ones an expert each."""
    mixtral = arch.model_type == "mixtral"
    hidden, count = config["hidden_size"], config["num_local_experts" if mixtral else "num_experts"]
    width = config["intermediate_size" if mixtral else "moe_intermediate_size"]
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {k: f"{k}_proj" for k in ("gate", "up", "down")}
    yield f"{arch.experts}.gate.weight", Slot("ffn_gate_inp.weight", (count, hidden))
    merged = f"{block}ffn_gate_exps.weight" in file.tensors or f"{block}ffn_gate.0.weight" not in file.tensors
    for kind, ours in names.items():
        shape = (hidden, width) if kind == "down" else (width, hidden)
        for e in range(count):
            slot = Slot(f"ffn_{kind}_exps.weight", shape, expert=e) if merged else Slot(f"ffn_{kind}.{e}.weight", shape)
            yield f"{arch.experts}.experts.{e}.{ours}.weight", slot
    if arch.shared_expert:
        width = config["shared_expert_intermediate_size"]
        yield f"{arch.experts}.shared_expert_gate.weight", Slot("ffn_gate_inp_shexp.weight", (1, hidden))
        for kind in ("gate", "up", "down"):
            shape = (hidden, width) if kind == "down" else (width, hidden)
            yield f"{arch.experts}.shared_expert.{kind}_proj.weight", Slot(f"ffn_{kind}_shexp.weight", shape)
