"""Models by Hub id, through huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import QkitError
from ..storage.files import os_error
from .folder import PICKLE_HINT, FolderSource

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


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # The client's own base class, for connections that break in mid-transfer; it depends on the release.
    http_error = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, etag_timeout=5
            )
        )
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
        raise QkitError(
            f"cannot fetch {repo} from the Hub: {error}", "try again: it goes on where it stopped"
        ) from error
    except OSError as error:  # a full disk, an unwritable cache
        raise os_error("download to the cache", repo, error) from error


def _offline(repo: str) -> QkitError:
    return QkitError(
        f"cannot reach the Hub for {repo}, and no copy of it is cached here",
        f"go online once, or download it elsewhere (hf download {repo} --local-dir DIR) and name the folder; "
        "if you meant a local folder: there is none of that name",
    )
