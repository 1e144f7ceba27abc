"""Models by Hub id, through huggingface_hub and its cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import QkitError
from ..models.config import check_names
from ..storage.files import os_error, read_json
from ..storage.local import at
from ..storage.safetensors import checked_meta
from .folder import PICKLE_HINT, FolderSource
from .headers import Headers
from .types import Source

# No pickles, no other framework's weights, no second copy in a subfolder ("*" also matches "/" here).
_ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
_IGNORE = ["consolidated*.safetensors", "adapter_model.safetensors"] + [
    f"*/*{suffix}" for suffix in (".safetensors", ".json", ".py", ".txt", ".model", ".tiktoken")
]


def open_hub(spec: str) -> FolderSource:
    """The model "org/name" or "org/name@revision": from the Hub when online, else from the local cache.

    Raises QkitError when there is no network and no cached copy, when the model or revision does not exist, is
    gated, or has no safetensors weights.
    """
    repo, _, revision = spec.partition("@")
    folder = _download(repo, revision or None)
    if not any(folder.glob("*.safetensors")):
        raise QkitError(f"{repo} has no safetensors weights on the Hub", PICKLE_HINT)
    return FolderSource(folder, label=spec, base_model=repo)


def wanted(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that belong to a model as qkit reads it."""
    import huggingface_hub

    return list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    with asking(repo, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, etag_timeout=5
            )
        )


def describe_hub(spec: str) -> Source:
    """The model's config and headers: config.json, the index and the first bytes of each shard are asked for, no tensor
    is. Without a network, a copy in the cache.

    Raises QkitError as `open_hub`."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = spec.partition("@")
    try:
        with asking(repo, revision or None):
            # First what is asked once: without a network the others try again for half a minute.
            sha = huggingface_hub.HfApi().model_info(repo, revision=revision or None, timeout=5).sha
            place = huggingface_hub.hf_hub_download(repo, "config.json", revision=sha, etag_timeout=5)
            files = huggingface_hub.get_safetensors_metadata(repo, revision=sha).files_metadata
    except Unreachable:
        return open_hub(spec)
    except errors.EntryNotFoundError as error:
        raise QkitError(f"{repo} has no config.json on the Hub", "is it a model that transformers loads?") from error
    except errors.NotASafetensorsRepoError as error:
        raise QkitError(f"{repo} has no safetensors weights on the Hub", PICKLE_HINT) from error
    except errors.SafetensorsParsingError as error:
        raise QkitError(f"{repo}: a header on the Hub is none: {error}", "check the model's origin") from error
    try:
        metas = {
            name: checked_meta(name, info.dtype, info.shape)
            for file in files.values()
            for name, info in file.tensors.items()
        }
    except ValueError as error:
        raise QkitError(f"{repo}: a header on the Hub is none: {error}", "check the model's origin") from error
    config = read_json(at(Path(place).parent), "config.json", "fetch config.json again")
    check_names(config)
    return Headers(spec, repo, config, metas)


class Unreachable(QkitError):
    """There is no network, or no Hub in it."""


@contextmanager
def asking(repo: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as users should read it."""
    from huggingface_hub import errors

    # The client's own base class, for connections that break in mid-transfer; it depends on the release.
    http_error = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise QkitError(
            f"{repo} is gated on the Hub",
            f"ask for access at https://huggingface.co/{repo} and log in with: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise QkitError(
            f"no model {repo!r}: neither a folder here nor a model on the Hub that you can see",
            "check the spelling; for a private model log in with: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise QkitError(f"{repo} has no revision {revision!r}", "leave the revision out for the newest one") from error
    except errors.HFValidationError as error:
        raise QkitError(f"{repo!r} is not a Hub id: {error}", "Hub ids look like org/name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise _offline(repo) from error
    except (http_error, RuntimeError) as error:  # RuntimeError: how the Xet transfer reports a broken connection
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):  # of the client's HTTP library
            raise _offline(repo) from error
        raise QkitError(
            f"cannot fetch {repo} from the Hub: {error}", "try again: it goes on where it stopped"
        ) from error
    except OSError as error:  # a full disk, an unwritable cache
        raise os_error("download to the cache", repo, error) from error


def _offline(repo: str) -> QkitError:
    return Unreachable(
        f"cannot reach the Hub for {repo}, and no copy of it is cached here",
        f"go online once, or download it elsewhere (hf download {repo} --local-dir DIR) and name the folder; "
        "if you meant a local folder: there is none of that name",
    )
