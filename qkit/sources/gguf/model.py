"""A GGUF file as a transformers checkpoint: names, shapes and values of the tensors as transformers has them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec.dtypes import TensorMeta, torch_dtype
from ...spec.ggml import GgmlType
from ...storage.files import first_few, natural_key
from ...storage.local import LocalStore
from ...storage.store import Store
from ..types import CARD_KEYS, ROWS, Rows, Sidecar, Stored
from . import tokenizer as gguf_tokenizer
from .config import Arch, Keys, build_config, find_arch
from .file import GgufFile, TensorInfo
from .rope import rope_config
from .slots import ROPE_FREQS, slots

if TYPE_CHECKING:
    import torch

_DTYPES = ("BF16", "F16", "F32")


class GgufSource:
    """`types.Source` over a GGUF file; every tensor is dequantized as it is read. Thread-safe.

    dtype: of every tensor; None: floats as they are stored, quantized ones as bfloat16 (rounded once, by at most 2**-9
    of each value).

    Raises QkitError on opening as `gguf.open_gguf` says.
    """

    def __init__(
        self, file: GgufFile, base_model: str | None = None, dtype: str | None = None, label: str | None = None
    ):
        if dtype is not None and dtype not in _DTYPES:
            raise QkitError(f"tensors cannot be read as {dtype!r}", f"use {', '.join(_DTYPES)}")
        self._file, self._dtype = file, dtype
        self.label = label or file.path
        name, arch = find_arch(file.metadata, file.path)
        self.config = self._config(name, arch)
        self._slots = dict(sorted(slots(arch, self.config, file.tensors), key=lambda item: natural_key(item[0])))
        self._check()
        gguf_tokenizer.check(file.metadata, name, self.config["vocab_size"], file.path)
        self.base_model = base_model or _base_model(file)
        self.folder = _written_folder(file)
        facts = {key: file.metadata.get(f"general.{key.replace('_', '.')}") for key in CARD_KEYS}
        self.metadata: dict[str, Any] = {key: value for key, value in facts.items() if isinstance(value, str) and value}
        infos = file.tensors.values()
        types = Counter(info.type.name for info in infos)
        quantized = any(info.type.plain is None for info in infos)
        self.stored = Stored(sum(info.nbytes for info in infos), dict(types), quantized)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What lies in the file, under its names."""
        return self._file.tensors

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
        return _split_halves(tensor, slot.heads) if slot.heads else tensor

    def read_part(self, name: str, index: int) -> torch.Tensor:
        return self.read(name)[index].clone()

    def rows(self, name: str) -> Rows | None:
        slot, dtype = self._slots[name], torch_dtype(self.meta(name).dtype)
        head = slot.shape[0] // slot.heads if slot.heads else 1
        if (
            slot.minus_one
            or self._file.tensors[slot.gguf].shape[slot.expert is not None :] != slot.shape
            or ROWS % head
        ):
            return None

        def read(start: int, stop: int) -> torch.Tensor:
            tensor = self._file.read(slot.gguf, dtype, slot.expert, (start, stop))
            return _split_halves(tensor, tensor.shape[0] // head) if slot.heads else tensor

        return read

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
        count = config.get("num_experts", config.get("num_local_experts"))
        router = file.tensors.get("blk.0.ffn_gate_inp.weight")
        if count is not None and router is not None and router.shape[0] != count:  # before as many are listed
            raise QkitError(f"{file.path}: {count} experts in the metadata, a router of {router.shape[0]}")
        factors = None
        if ROPE_FREQS in file.tensors:
            require_readable(file.tensors[ROPE_FREQS].type, ROPE_FREQS)
            factors = file.read(ROPE_FREQS, torch.float32).flatten().tolist()
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
        extra = sorted(tensors.keys() - {slot.gguf for slot in self._slots.values()} - {ROPE_FREQS}, key=natural_key)
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


def _split_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of so many heads: ggml rotates neighbours (2i, 2i + 1), transformers i and i + half of the head."""
    split = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape).contiguous()


def _written_folder(file: GgufFile) -> Path | Store | None:
    """The folder that qkit wrote the file into, where it did: what it was calibrated on is noted there."""
    from ...storage.manifest import Manifest

    try:
        manifest = Manifest.find(file.store)
    except QkitError:  # of something else that lies there
        return None
    if manifest is None or file.name not in manifest.files:
        return None
    return Path(file.path).parent if isinstance(file.store, LocalStore) else file.store


def require_readable(ggml_type: GgmlType, tensor: str) -> None:
    """Raises QkitError where a tensor's type cannot be turned into floats."""
    from ...kernels.ggml import readable, readable_types

    if not readable(ggml_type):
        raise QkitError(
            f"tensor {tensor} has the ggml type {ggml_type.name}, which qkit does not read",
            f"use a file in one of {', '.join(readable_types())}",
        )


def _base_model(file: GgufFile) -> str:
    """What the file calls its model: a Hub id where it names one, else its name."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        value = file.metadata.get(key)
        if isinstance(value, str) and value:
            return value.removeprefix("https://huggingface.co/").rstrip("/")
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else Path(file.name).stem
