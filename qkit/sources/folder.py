"""A folder as the Hub and `save_pretrained` lay it out: config.json, safetensors (one file or sharded), the rest."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import QkitError
from ..models.config import architectures, check_names
from ..spec.dtypes import TensorMeta
from ..storage.files import first_few, is_plain_name, natural_key, read_json
from ..storage.local import LocalStore, at
from ..storage.safetensors import SafetensorsFile
from ..storage.store import Store, read_bytes, read_file
from ..untrusted import MAX_YAML_BYTES, parse_yaml
from .types import CARD_KEYS, Rows, Sidecar, Stored

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_HINT = (
    "pickle files can run any code when opened, so qkit does not: load the model once in transformers and call "
    "save_pretrained(folder, safe_serialization=True), or look for a safetensors version of it"
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_SIDECAR_SUFFIXES = (".json", ".jinja", ".py", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".bpe", ".md")
_SIDECAR_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
# What describes the source's own storage or training, and would be untrue of what is made from it.
_NOT_SIDECARS = {
    "config.json", "readme.md", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "adapter_config.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
}  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_READ = ("config.json", "README.md", "quantize_config.json", "quant_config.json")  # beside sidecars and weights
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\.")
_AT_ONCE = 16  # headers and samples that are read at a time
_SAMPLED = 1024  # tensors whose samples are in memory
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _is_sidecar(name: str) -> bool:
    lower = name.lower()
    if not is_plain_name(name) or lower.startswith("qkit_") or lower in _NOT_SIDECARS:
        return False
    if lower.endswith(".index.json") or lower.endswith(".safetensors"):
        return False
    return lower.endswith(_SIDECAR_SUFFIXES) or name.upper().startswith(_SIDECAR_STEMS)


def find_sidecars(store: Store) -> tuple[Sidecar, ...]:
    """The files that travel with the weights, sorted by name; those in additional_chat_templates keep that folder
    in their name. Raises QkitError for a link that points nowhere: leaving it out would lose a file silently."""
    names = [name for name in store.names() if _is_sidecar(name)]
    names += [name for name in store.names(_TEMPLATES) if _is_sidecar(name.rpartition("/")[2])]
    return tuple(Sidecar(name, store) for name in names)


def _read_index(store: Store) -> dict[str, str]:
    """The weight_map of an index: tensor name -> shard, which must be the name of a file in the same folder."""
    hint = "the index is damaged: fetch it again"
    weight_map = read_json(store, INDEX, hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QkitError(f"{store.label}/{INDEX} has no weight_map", hint)
    for name, shard in weight_map.items():
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise QkitError(
                f"{store.label}/{INDEX} maps {name!r} to {str(shard)[:200]!r}, "
                "which is not a safetensors file in its folder",
                hint,
            )
    missing = sorted({shard for shard in weight_map.values()} - set(store.names()), key=natural_key)
    if missing:
        raise QkitError(
            f"{store.label} lacks {len(missing)} of {len(set(weight_map.values()))} shards: {first_few(missing)}",
            "the download is incomplete: fetch the missing files",
        )
    return weight_map


def _open_shards(store: Store) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file it is read from. One file wins over an index, as in transformers."""
    listing = store.names()
    if SINGLE in listing:
        file = SafetensorsFile(store.open(SINGLE))
        return dict.fromkeys(file.names(), file)
    if INDEX in listing:
        return _open_indexed(store)
    found = [n for n in listing if n.endswith(".safetensors") and not n.startswith((".", "adapter_"))]
    if len(found) == 1:
        file = SafetensorsFile(store.open(found[0]))
        return dict.fromkeys(file.names(), file)
    folder = store.label
    if found:
        raise QkitError(f"{folder} holds {len(found)} safetensors files and no {INDEX}", "fetch the index as well")
    if "adapter_config.json" in listing:
        raise QkitError(f"{folder} is a LoRA adapter, not a model", f"name its base model and add --lora {folder}")
    pickles = [n for n in listing if n.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise QkitError(f"{folder} holds its weights as pickle files only: {first_few(pickles)}", PICKLE_HINT)
    gguf = [n for n in listing if n.lower().endswith(".gguf")]
    if gguf:
        raise QkitError(f"{folder} holds GGUF files: {first_few(gguf)}", "name the .gguf file itself")
    raise QkitError(f"{folder} holds no safetensors weights", f"expected {SINGLE}, or {INDEX} and its shards")


def only_gguf(listing: Collection[str]) -> str | None:
    """The .gguf file of a folder that holds one model so, and none as safetensors; of a split one the first part.
    listing: the names of its files."""
    if SINGLE in listing or INDEX in listing:
        return None
    found = [n for n in listing if n.lower().endswith(".gguf") and not _LATER_PART.search(n)]
    return found[0] if len(found) == 1 else None


def _each(store: Store, do: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """do(name) for each, in order; several at a time where each is a way over a network and back."""
    if isinstance(store, LocalStore):
        yield from map(do, names)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(do, names)


def _open_indexed(store: Store) -> dict[str, SafetensorsFile]:
    weight_map = _read_index(store)
    files = sorted(set(weight_map.values()), key=natural_key)
    shards = dict(zip(files, _each(store, lambda name: SafetensorsFile(store.open(name)), files), strict=True))
    absent = [name for name, shard in weight_map.items() if name not in shards[shard].entries]
    if absent:
        raise QkitError(
            f"{store.label}/{INDEX} names {len(absent)} tensors that their shards lack: {first_few(absent)}",
            "index and shards do not belong together: fetch them again",
        )
    where = {name: shards[shard] for name, shard in weight_map.items()}
    # Engines load every tensor of every shard, indexed or not, so a tensor the index forgot belongs to the
    # model. A second copy of an indexed one does not: the index says which counts. Two copies of a forgotten
    # one leave nothing to decide by.
    for shard in shards.values():
        for name in shard.names():
            if where.setdefault(name, shard) is not shard and name not in weight_map:
                raise QkitError(
                    f"{store.label}: {name!r} is in {where[name].file.name} and in {shard.file.name}, "
                    "and the index does not say which counts",
                    "fetch the model again",
                )
    return where


def _base_model(folder: Path | None, config: dict[str, Any]) -> str:
    if folder and folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    name = config.get("_name_or_path")
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(name):
        return name
    kind = config.get("model_type")
    return f"{kind} model" if isinstance(kind, str) else "model"


def _metadata(store: Store) -> dict[str, Any]:
    """What the front matter of the model card declares, for the card of what is made from it; {} where unreadable."""
    try:
        file = store.open("README.md")
        text = read_bytes(file, 0, min(file.nbytes, MAX_YAML_BYTES)).decode("utf-8", "ignore")  # its end may be cut off
        front = _FRONT_MATTER.match(text)
        found = parse_yaml(front[1]) if front else None
    except (QkitError, ValueError):  # no card, or YAML that is none: never a reason to refuse weights
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in CARD_KEYS if _is_words(found.get(key))}


def _is_words(value: Any) -> bool:
    """A text, or a list of such, as the Hub has them."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word for word in words)


def _refuse_links_out(folder: Path, names: Iterable[str]) -> None:
    """Raises QkitError where a file whose content is carried into results lies elsewhere: somebody's folder must not
    name what to take along from this machine. Links into a Hub cache are what its snapshots consist of."""
    root = os.path.realpath(folder)
    for name in names:
        place = os.path.realpath(folder / name)
        *_, repository, kind, _ = ("", "", *Path(place).parts)
        cached = kind == "blobs" and repository.startswith("models--")
        if os.path.commonpath((root, place)) != root and not cached:
            raise QkitError(
                f"{folder / name} is a link to {place}, outside of its folder",
                "put the file itself there, if it is meant to be part of the model",
            )


def _find_quantization(store: Store, config: dict[str, Any], names: Iterable[str]) -> None:
    """Adds what quantized folders of old writers say only in a file of its own: AutoGPTQ's, and AutoAWQ's."""
    if config.get("quantization_config") or config.get("compression_config"):
        return
    if not any(name.endswith(".qweight") for name in names):  # a file that was left behind says nothing
        return
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if store.has(name):
            given = read_json(store, name, f"fetch {name} again")
            config["quantization_config"] = {"quant_method": method, **given}
            return


def _canonical_names(stored: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The name that loaders look for -> the one on disk, for what transformers finds under another name too: a decoder
    saved by itself, without "model." before it, and a tied pair of which only the head is stored."""
    names = {name: name for name in stored}
    architecture = (architectures(config) or [""])[0]
    bare = any(_BARE.match(name) for name in names) and not any(name.startswith("model.") for name in names)
    if bare and architecture.endswith("ForCausalLM"):
        names = {(f"model.{name}" if _BARE.match(name) else name): name for name in names}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in names and embedding not in names and any(name.startswith("model.layers.") for name in names):
        names[embedding] = names.pop(head)
    return names


class FolderSource:
    """A model folder. Opening it reads config.json, the index and every shard's header, and no tensor.

    Raises QkitError for anything missing, damaged, or stored as pickle.
    """

    def __init__(self, place: str | Path | Store, label: str | None = None, base_model: str | None = None):
        here = Path(place) if isinstance(place, str | Path) else None
        if here is not None and not os.path.isdir(here):
            raise QkitError(f"{here} is not a folder")
        self._store = store = at(place)
        self.folder: Path | Store | None = here or store
        self.label = label or store.label
        self._where = _open_shards(store)
        if not store.has("config.json"):
            raise QkitError(f"{store.label} has no config.json", "fetch it from where the weights came from")
        self.sidecars = find_sidecars(store)
        if here is not None:
            _refuse_links_out(here, [*_READ, *(sidecar.name for sidecar in self.sidecars)])
        self.config = read_json(store, "config.json", "fetch config.json again")
        check_names(self.config)
        _find_quantization(store, self.config, self._where)
        self.base_model = base_model or _base_model(here and here.absolute(), self.config)
        self._stored = _canonical_names(self._where, self.config)
        self._names = sorted(self._stored, key=natural_key)
        metas = [self.meta(name) for name in self._names]
        quantized = bool(self.config.get("quantization_config") or self.config.get("compression_config"))
        self.stored = Stored(sum(m.nbytes for m in metas), dict(Counter(m.dtype for m in metas)), quantized)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return _metadata(self._store) if self._store.has("README.md") else {}

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(read_file(self._store, "config.json"))
        for start in range(0, len(self._names), _SAMPLED):
            names = self._names[start : start + _SAMPLED]
            for name, sample in zip(names, _each(self._store, self._sample, names), strict=True):
                meta = self.meta(name)
                digest.update(f"{name}\0{meta.dtype}{list(meta.shape)}\n".encode())
                digest.update(sample)
        for sidecar in self.sidecars:
            digest.update(f"{sidecar.name}\0{sidecar.sha256}\n".encode())
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        stored = self._stored[name]
        return self._where[stored].sample(stored)

    def names(self) -> list[str]:
        """Tensor names in natural order."""
        return list(self._names)

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape; KeyError for an unknown name."""
        stored = self._stored[name]
        return self._where[stored].meta(stored)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own; thread-safe. QkitError if the file changed or cannot be read."""
        stored = self._stored[name]
        return self._where[stored].read(stored)

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """`read(name)[index]`; nothing else is read."""
        stored = self._stored[name]
        return self._where[stored].rows(stored, index, index + 1)[0]

    def rows(self, name: str) -> Rows:
        """A reader of parts of `read(name)`."""
        stored = self._stored[name]
        return partial(self._where[stored].rows, stored)
