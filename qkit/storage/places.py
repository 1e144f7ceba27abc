"""What a name with a scheme means: s3://bucket/prefix, gs://bucket/prefix, hf://org/name[@revision][/file]."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import QkitError

BUCKETS = ("s3", "gs")
HUB = "hf"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HUB_PLACE = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?"
)


@dataclass(frozen=True)
class Place:
    """A prefix in a bucket. scheme: "s3" or "gs"; prefix: without "/" at its ends, "" for the bucket itself."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.prefix.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        return Place(self.scheme, self.bucket, self.prefix.rpartition("/")[0])

    def holds(self, other: Place) -> bool:
        """Whether the other one is this one, or lies in it."""
        same = (self.scheme, self.bucket) == (other.scheme, other.bucket)
        return same and (not self.prefix or f"{other.prefix}/".startswith(f"{self.prefix}/"))


@dataclass(frozen=True)
class HubPlace:
    """A repository on the Hub, or one file of it. revision: None for the newest."""

    repo: str
    revision: str | None
    file: str | None


def scheme_of(text: str) -> str | None:
    """ "s3" of "s3://...", None of a name without a scheme."""
    found = _SCHEME.match(text)
    return found[1].lower() if found else None


def parse_place(text: str) -> Place:
    """A bucket's. Raises QkitError for what is none."""
    scheme, _, rest = text.partition("://")
    bucket, _, path = rest.partition("/")
    prefix = path.strip("/")
    parts = prefix.split("/") if prefix else []
    if scheme.lower() not in BUCKETS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise QkitError(f"{text!r} names no bucket", "write s3://bucket/prefix or gs://bucket/prefix")
    if any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 for c in prefix) or set(prefix) & set("?#\\"):
        raise QkitError(f"{text!r} is not a path in a bucket", "write s3://bucket/prefix or gs://bucket/prefix")
    return Place(scheme.lower(), bucket, prefix)


def parse_hub(text: str) -> HubPlace:
    """A repository's. Raises QkitError for what is none."""
    found = _HUB_PLACE.fullmatch("hf" + text[2:].rstrip("/"))
    if found is None:
        raise QkitError(
            f"{text!r} is not a model on the Hub", "write hf://org/name, hf://org/name@revision or one file of it"
        )
    return HubPlace(found["repo"], found["revision"], found["file"])
