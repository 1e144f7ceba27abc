"""Bytes on disk <-> named tensors. Knows nothing of models or of quantization."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..storage.places import scheme_of
from .remote import SCHEMES, open_hub_ranged, open_remote

if TYPE_CHECKING:
    from .types import Source

DEMO = "demo"
_HUB_SPEC = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_HINT = (
    "name a folder with config.json and safetensors, a .gguf file, a Hub id (org/name), "
    "s3://bucket/prefix, gs://, hf://org/name, or: demo"
)


def open_source(spec: str, lora: str | None = None, ranged: bool = False) -> Source:
    """Open a checkpoint for reading.

    spec    "demo", a folder of safetensors, a .gguf file, a Hub id "org/name[@revision]", or what is read where it
            lies: s3://bucket/prefix, gs://bucket/prefix, hf://org/name[@revision]. What exists here wins over the Hub;
            a folder called demo is "./demo".
    lora    folder of a PEFT LoRA adapter, merged into the weights as they are read
    ranged  a Hub id is read where it lies too, and not fetched first

    Raises QkitError, before any tensor is read, for anything that is missing, damaged or unsupported.
    """
    source = _open(spec, ranged)
    if lora is None:
        return source
    from .lora import LoraSource

    return LoraSource(source, os.path.expanduser(lora))


def is_hub_id(spec: str) -> bool:
    """Whether a name that is nothing here can be a model's on the Hub."""
    return bool(_HUB_SPEC.fullmatch(spec)) and not spec.endswith((".gguf", ".safetensors"))


def _open(spec: str, ranged: bool) -> Source:
    if not spec:  # would otherwise mean the current folder
        raise QkitError("no source was named", _HINT)
    if spec == DEMO:
        from .demo import open_demo

        return open_demo()
    if scheme_of(os.fspath(spec)) in SCHEMES:
        return open_remote(spec)
    path = Path(os.path.expanduser(spec))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise QkitError(f"{spec[:200]!r} is not a usable path: {error}", _HINT) from error
    if is_folder:
        from .folder import FolderSource, only_gguf

        file = only_gguf(sorted(os.listdir(path)))
        if file is not None:
            from .gguf import open_gguf

            return open_gguf(path / file, label=spec)
        return FolderSource(path, label=spec)
    if is_file:
        return _open_file(path)
    if is_hub_id(spec):
        from .hub import open_hub

        return open_hub_ranged(spec) if ranged else open_hub(spec)
    raise QkitError(f"there is no {spec!r} here", _HINT)


def _open_file(path: Path) -> Source:
    from ..storage.local import open_file
    from ..storage.store import read_bytes
    from .folder import PICKLE_HINT, PICKLE_SUFFIXES

    file = open_file(path)
    magic = read_bytes(file, 0, min(4, file.nbytes))
    file.close()
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        from .gguf import open_gguf

        return open_gguf(path)
    if path.suffix.lower() == ".safetensors":
        raise QkitError(f"{path} is one file of a model", f"name its folder: {path.parent}")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise QkitError(f"{path} is a pickle file", PICKLE_HINT)
    raise QkitError(f"{path} is not a checkpoint qkit reads", _HINT)
