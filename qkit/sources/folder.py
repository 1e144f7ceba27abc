"""A folder as the Hub and `save_pretrained` lay it out: config.json, safetensors (one file or sharded), the rest."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..spec.dtypes import TensorMeta
from ..storage.files import first_few, is_plain_name, natural_key, os_error, read_json
from ..storage.safetensors import SafetensorsFile
from .types import CARD_KEYS, Sidecar, Stored

if TYPE_CHECKING:
    import torch

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _is_sidecar(name: str) -> bool:
    lower = name.lower()
    if not is_plain_name(name) or lower.startswith("qkit_") or lower in _NOT_SIDECARS:
        return False
    if lower.endswith(".index.json") or lower.endswith(".safetensors"):
        return False
    return lower.endswith(_SIDECAR_SUFFIXES) or name.upper().startswith(_SIDECAR_STEMS)


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise os_error("read", folder, error) from error


def find_sidecars(folder: Path) -> tuple[Sidecar, ...]:
    """The files that travel with the weights, sorted by name; those in additional_chat_templates keep that folder
    in their name. Raises QkitError for a link that points nowhere: leaving it out would lose a file silently."""
    names = [name for name in _listing(folder) if _is_sidecar(name)]
    if (folder / _TEMPLATES).is_dir():
        names += [f"{_TEMPLATES}/{name}" for name in _listing(folder / _TEMPLATES) if _is_sidecar(name)]
    found = []
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise QkitError(f"{path} is a link to a file that is not there", "fetch the model again")
        if path.is_file():
            found.append(Sidecar(name, path))
    return tuple(found)


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> shard, which must be the name of a file in the same folder."""
    hint = "the index is damaged: fetch it again"
    index, _ = read_json(path, hint)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QkitError(f"{path} has no weight_map", hint)
    for name, shard in weight_map.items():
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise QkitError(
                f"{path} maps {name!r} to {str(shard)[:200]!r}, which is not a safetensors file in its folder", hint
            )
    missing = sorted({s for s in weight_map.values() if not (path.parent / s).exists()}, key=natural_key)
    if missing:
        raise QkitError(
            f"{path.parent} lacks {len(missing)} of {len(set(weight_map.values()))} shards: {first_few(missing)}",
            "the download is incomplete: fetch the missing files",
        )
    return weight_map


def _open_shards(folder: Path) -> tuple[dict[str, SafetensorsFile], list[SafetensorsFile]]:
    """(tensor name -> the file it is read from, every file). One file wins over an index, as in transformers."""
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        return _open_indexed(folder)
    if (folder / SINGLE).exists():
        file = SafetensorsFile(folder / SINGLE)
        return dict.fromkeys(file.names(), file), [file]
    listing = _listing(folder)
    found = [n for n in listing if n.endswith(".safetensors") and not n.startswith((".", "adapter_"))]
    if len(found) == 1:
        file = SafetensorsFile(folder / found[0])
        return dict.fromkeys(file.names(), file), [file]
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


def _open_indexed(folder: Path) -> tuple[dict[str, SafetensorsFile], list[SafetensorsFile]]:
    weight_map = _read_index(folder / INDEX)
    shards = {n: SafetensorsFile(folder / n) for n in sorted(set(weight_map.values()), key=natural_key)}
    absent = [name for name, shard in weight_map.items() if name not in shards[shard].entries]
    if absent:
        raise QkitError(
            f"{folder / INDEX} names {len(absent)} tensors that their shards lack: {first_few(absent)}",
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
                    f"{folder}: {name!r} is in {where[name].path.name} and in {shard.path.name}, "
                    "and the index does not say which counts",
                    "fetch the model again",
                )
    return where, list(shards.values())


def _base_model(folder: Path, config: dict[str, Any]) -> str:
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    name = config.get("_name_or_path")
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    kind = config.get("model_type")
    return f"{kind} model" if isinstance(kind, str) else "model"


def _metadata(folder: Path) -> dict[str, Any]:
    """What the front matter of the model card declares, for the card of what is made from it; {} where unreadable."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or YAML that is none: never a reason to refuse weights
        return {}
    return {key: found[key] for key in CARD_KEYS if found.get(key)}


class FolderSource:
    """A model folder. Opening it reads config.json, the index and every shard's header, and no tensor.

    Raises QkitError for anything missing, damaged, or stored as pickle.
    """

    def __init__(self, path: str | Path, label: str | None = None, base_model: str | None = None):
        self.label = label or str(path)
        self.path = Path(path)
        if not os.path.isdir(path):
            raise QkitError(f"{path} is not a folder")
        try:
            self._open(self.path, base_model)
        except OSError as error:  # a folder that may not be searched, a file that vanishes
            raise os_error("read", error.filename or path, error) from error

    def _open(self, folder: Path, base_model: str | None) -> None:
        self._where, self._files = _open_shards(folder)
        if not (folder / "config.json").exists():
            raise QkitError(f"{folder} has no config.json", "fetch it from where the weights came from")
        self.config, raw = read_json(folder / "config.json", "fetch config.json again")
        self.sidecars = find_sidecars(folder)
        self.base_model = base_model or _base_model(folder.absolute(), self.config)
        self._names = sorted(self._where, key=natural_key)
        self.folder: Path | None = folder
        metas = [self._where[name].meta(name) for name in self._names]
        quantized = bool(self.config.get("quantization_config") or self.config.get("compression_config"))
        self.stored = Stored(sum(m.nbytes for m in metas), dict(Counter(m.dtype for m in metas)), quantized)
        self.metadata = _metadata(folder) if (folder / "README.md").is_file() else {}
        digest = hashlib.sha256(hashlib.sha256(raw).digest())
        for file in self._files:
            digest.update(f"{file.path.name}\0{file.fingerprint()}\n".encode())
        for name in self._names:
            digest.update(f"{name}\0{self._where[name].path.name}\n".encode())
        for sidecar in self.sidecars:
            digest.update(f"{sidecar.name}\0{hashlib.sha256(sidecar.read()).hexdigest()}\n".encode())
        self.fingerprint = digest.hexdigest()

    def names(self) -> list[str]:
        """Tensor names in natural order."""
        return list(self._names)

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape; KeyError for an unknown name."""
        return self._where[name].meta(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own; thread-safe. QkitError if the file changed or cannot be read."""
        return self._where[name].read(name)
