"""Checkpoints that stay where they are: s3://, gs:// and hf://, of which what is needed is read in ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import QkitError
from ..storage.places import BUCKETS, HUB, parse_hub, parse_place, scheme_of

if TYPE_CHECKING:
    from ..storage.remote import RemoteStore
    from .types import Source

SCHEMES = (*BUCKETS, HUB)


def open_remote(spec: str) -> Source:
    """The checkpoint at s3://bucket/prefix, gs://bucket/prefix or hf://org/name[@revision]: a folder of safetensors, or
    the one .gguf file in it, or a .gguf file by name.

    Raises QkitError as `open_source`, and where a conversion there is not finished."""
    from ..storage.remote import RemoteStore

    scheme = scheme_of(spec)
    if scheme == HUB:
        from .hub_files import HubObjects

        place = parse_hub(spec)
        store = RemoteStore(HubObjects(place.repo, place.revision, everything=bool(place.file)), fixed=True)
        if not place.file:
            _check_weights(store, place.repo)
        return _opened(store, spec, place.file, place.repo)
    from ..storage.object_store import open_objects

    at = parse_place(spec)
    is_file = at.name.lower().endswith(".gguf")
    store = RemoteStore(open_objects(at.parent if is_file else at), fixed=True)
    return _opened(store, spec, at.name if is_file else None)


def open_hub_ranged(spec: str) -> Source:
    """The model "org/name[@revision]", as `hub.open_hub` has it, of which only what is asked for is read. Without a
    network, a copy in the cache."""
    from ..storage.remote import RemoteStore
    from .hub import Unreachable, open_hub
    from .hub_files import HubObjects

    repo, _, revision = spec.partition("@")
    try:
        objects = HubObjects(repo, revision or None)
    except Unreachable:
        return open_hub(spec)
    store = RemoteStore(objects, fixed=True)
    _check_weights(store, repo)
    return _opened(store, spec, None, repo)


def _check_weights(store: RemoteStore, repo: str) -> None:
    from .folder import PICKLE_HINT

    if not any(name.endswith(".safetensors") for name in store.names()):
        raise QkitError(
            f"{repo} has no safetensors weights on the Hub",
            f"of a GGUF repository name one file: hf://{repo}/FILE.gguf; " + PICKLE_HINT,
        )


def _opened(store: RemoteStore, label: str, file: str | None, base_model: str | None = None) -> Source:
    from ..storage.manifest import MANIFEST, Manifest
    from .folder import FolderSource, only_gguf

    names = store.names()
    if file is None and not names:
        raise QkitError(f"there is nothing at {store.label}", "check the bucket and the path")
    if MANIFEST in names and not Manifest.load(store).complete:
        raise QkitError(
            f"{store.label} is an unfinished conversion",
            "repeat the command that writes it: it goes on where it stopped",
        )
    file = file or only_gguf(names)
    if file is None:
        return FolderSource(store, label=label, base_model=base_model)
    if not file.lower().endswith(".gguf"):
        raise QkitError(f"{label} is one file of a model", f"name the model: {store.label}")
    from .gguf import open_gguf

    return open_gguf(store.open(file), base_model=base_model, label=label, store=store)
