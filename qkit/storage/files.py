"""Small helpers every reader and writer here shares: order of names, plain file names, JSON, system errors."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from ..errors import QkitError
from ..untrusted import parse_json
from .store import Store, read_bytes

MAX_JSON_BYTES = 100 << 20  # what safetensors allows a header; no config or index comes near it

_OS_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another disk",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EROFS: "the file system is mounted read-only: choose another folder",
    errno.EFBIG: "the file is larger than the file system or your file size limit (ulimit -f) allows",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENOENT: "it, or a folder above it, is not there: if it was moved or removed meanwhile, put it back",
    errno.EIO: "the disk reports an error: check its health and free space",
}
_DIGITS = re.compile(r"([0-9]+)")


def os_error(action: str, path: str | Path, error: OSError) -> QkitError:
    """`error`, met while doing `action` ("read", "write") to `path`, as users should read it."""
    hint = _OS_HINTS.get(error.errno) if error.errno is not None else None
    return QkitError(f"cannot {action} {path}: {error.strerror or error}", hint)


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that puts layers.2 before layers.10; ties (01 and 1) fall back to the plain order."""
    parts: list[Any] = _DIGITS.split(name)
    for i in range(1, len(parts), 2):  # odd parts are the digits; (length, digits) compares like the number
        digits = parts[i].lstrip("0")
        parts[i] = (len(digits), digits)
    return (parts, name)


def is_plain_name(name: object) -> bool:
    """True for the name of a file directly in a folder: no separator, no "..", nothing a shell would hide."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and not name.startswith(".")
        and not any(c in "/\\:" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
    )


def is_inside(name: object) -> bool:
    """True for a relative path, "/" between plain names, that stays in the folder it is relative to."""
    return isinstance(name, str) and all(is_plain_name(part) for part in name.split("/"))


def first_few(names: list[str], limit: int = 3) -> str:
    """Enough of a list to find the problem: a, b, c and 7 more."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def read_json(store: Store, name: str, hint: str | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Raises QkitError (with `hint`) if the file cannot be read, is not JSON, or is not an object.
    """
    file = store.open(name)
    try:
        if file.nbytes > MAX_JSON_BYTES:
            raise QkitError(f"{file.label} is {file.nbytes} bytes long, which no {name} is", hint)
        raw = read_bytes(file)
    finally:
        file.close()
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise QkitError(f"{file.label} is not valid JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise QkitError(f"{file.label} holds a JSON {type(value).__name__}, not an object", hint)
    return value
