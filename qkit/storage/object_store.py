"""s3:// and gs:// through obstore (`pip install 'qkit-llm[remote]'`), with its usual credentials and endpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import QkitError
from .places import Place
from .remote import PARTS_AT_ONCE, Found, Passing, changed

if TYPE_CHECKING:
    from .remote import Objects

# One answer may take long on a thin line; one that stands still does not come any more.
_CLIENT = {"timeout": "15m", "connect_timeout": "10s", "read_timeout": "60s"}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_BROKEN = {
    "dns error": "the name of the server is not known",
    "Connection refused": "the server refuses the connection",
    "error sending request": "the connection failed",
    "body error": "the connection broke in the middle of an answer",
    "error decoding": "the connection broke in the middle of an answer",
}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (needs boto3); for a public bucket "
    "AWS_SKIP_SIGNATURE=true",
    "gs": "run: gcloud auth application-default login; or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
}
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}
_SERVICE = {"s3": "S3", "gs": "Google Cloud Storage"}


def open_objects(place: Place) -> Objects:
    """The objects at a place; nothing is asked yet. Raises QkitError where the library is missing."""
    try:
        import obstore
    except ImportError as error:
        raise QkitError(
            f"{place.scheme}:// needs the package obstore, which is not installed",
            "run: pip install 'qkit-llm[remote]'",
        ) from error
    return BucketObjects(obstore, place)


class BucketObjects:
    """`remote.Objects` of a bucket."""

    def __init__(self, obstore: Any, place: Place):
        self._obstore, self._place, self.label = obstore, place, str(place)
        # What qkit asks, it asks again itself (remote.persist); the parts of an upload are the library's to send again.
        self._once = self._store({"max_retries": 0})
        self._uploads = self._store({"max_retries": 8})

    def _store(self, retries: dict[str, Any]) -> Any:
        from obstore import store

        place = self._place
        client: dict[str, Any] = dict(_CLIENT)
        try:
            endpoint = next((value for name in _ENDPOINTS[place.scheme] if (value := os.environ.get(name))), "")
            if endpoint.startswith("http://"):  # whoever names it so means it
                client["allow_http"] = True
            if place.scheme == "gs":
                return store.GCSStore(place.bucket, client_options=client, retry_config=retries)
            more: dict[str, Any] = {}
            if _needs_profile():
                more["credential_provider"], region = _profile(place)
                if region and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
                    more["region"] = region
            return store.S3Store(place.bucket, client_options=client, retry_config=retries, **more)
        except QkitError:
            raise
        except Exception as error:  # a key file that is none, an endpoint that is no URL
            raise QkitError(f"{place}: {_first_line(error)}", _CREDENTIALS[place.scheme]) from error

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._place.prefix, name) if part)

    def _found(self, meta: Any) -> Found:
        name = meta["path"].removeprefix(self._place.prefix).lstrip("/")
        return Found(name, meta["size"], meta.get("e_tag") or f"{meta['size']} {meta['last_modified']}")

    def list(self, folder: str, deep: bool = False) -> list[Found]:
        prefix = self._key(folder) or None
        try:
            if deep:
                metas = [meta for page in self._obstore.list(self._once, prefix) for meta in page]
            else:
                metas = self._obstore.list_with_delimiter(self._once, prefix)["objects"]
        except Exception as error:
            self._translate(error, self.label)
        return [self._found(meta) for meta in metas]

    def find(self, name: str) -> Found | None:
        try:
            return self._found(self._obstore.head(self._once, self._key(name)))
        except FileNotFoundError:
            return None
        except Exception as error:
            self._translate(error, f"{self.label}/{name}")

    def get(self, found: Found, start: int, end: int) -> Any:
        label = f"{self.label}/{found.name}"
        options: dict[str, Any] = {"range": (start, end)}
        if " " not in found.tag:  # of the server's making
            options["if_match"] = found.tag
        try:
            result = self._obstore.get(self._once, self._key(found.name), options=options)
            now = self._found(result.meta)
            # A listing may quote a tag in another way than an answer does.
            if (now.tag.strip('"'), now.nbytes) != (found.tag.strip('"'), found.nbytes):
                raise changed(label)
            return result.bytes()
        except FileNotFoundError as error:
            raise changed(label) from error
        except QkitError:
            raise
        except Exception as error:
            if type(error).__name__ == "PreconditionError":
                raise changed(label) from error
            self._translate(error, label)

    def put(self, name: str, data: bytes | bytearray) -> None:
        try:
            self._obstore.put(self._once, self._key(name), data, use_multipart=False)
        except Exception as error:
            self._translate(error, f"{self.label}/{name}")

    def put_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        try:
            mode = "create" if tag is None else self._only_over(name, tag)
            if mode is None:
                return None
            done = self._obstore.put(self._once, self._key(name), data, mode=mode, use_multipart=False)
        except Exception as error:
            other = type(error).__name__ in ("AlreadyExistsError", "PreconditionError")
            gone = tag is not None and isinstance(error, FileNotFoundError)
            if other or gone or "ConditionalRequestConflict" in str(error):  # the last: two at the same moment
                return None
            self._translate(error, f"{self.label}/{name}")
        return str(done["e_tag"])

    def _only_over(self, name: str, tag: str) -> dict[str, str] | None:
        """What makes a writing fail unless the object still has its tag; None where it does not have it now."""
        if self._place.scheme == "s3":
            return {"e_tag": tag}
        meta = self._obstore.head(self._once, self._key(name))  # there it is told by its generation
        return {"e_tag": tag, "version": meta["version"]} if meta.get("e_tag") == tag else None

    def upload(self, name: str, parts: Iterator[bytearray], part_bytes: int) -> None:
        failed: list[BaseException] = []

        def given() -> Iterator[bytearray]:
            try:
                yield from parts
            except BaseException as error:
                failed.append(error)
                raise

        try:
            self._obstore.put(
                self._uploads, self._key(name), given(), chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE
            )
        except Exception as error:
            if failed:
                raise failed[0] from None
            try:
                self._translate(error, f"{self.label}/{name}")
            except Passing as passing:
                raise QkitError(
                    f"cannot write {self.label}/{name}: {passing} (9 tries)",
                    "check the network and the service; the same command goes on where this one stopped",
                ) from error

    def delete(self, name: str) -> None:
        try:
            self._obstore.delete(self._once, self._key(name))
        except FileNotFoundError:
            pass
        except Exception as error:
            self._translate(error, f"{self.label}/{name}")

    def _translate(self, error: Exception, label: str) -> NoReturn:
        """Raise what the library's error is: Passing, or a QkitError that says what to do."""
        text, kind, scheme = str(error), type(error).__name__, self._place.scheme
        status = int(found[1]) if (found := _STATUS.search(text)) else None
        code = found[1] if (found := _CODE.search(text)) else ""
        service = _SERVICE[scheme]
        if "169.254.169.254" in text or "metadata.google.internal" in text or "token request" in text:
            raise QkitError(f"no credentials for {service} were found: {label}", _CREDENTIALS[scheme]) from error
        if code == "NoSuchBucket" or (kind in ("NotFoundError", "FileNotFoundError") and "bucket" in text.lower()):
            raise QkitError(f"there is no bucket {self._place.bucket!r} at {service}", "check its name") from error
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException") or (
            status in (301, 307) or "redirect" in text.lower()
        ):
            raise QkitError(
                f"the bucket {self._place.bucket!r} is in another region", "set AWS_REGION to the bucket's region"
            ) from error
        if kind == "UnauthenticatedError" or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            raise QkitError(
                f"{service} does not take these credentials ({code or status}): {label}", _CREDENTIALS[scheme]
            ) from error
        if kind == "PermissionDeniedError" or status == 403:
            raise QkitError(
                f"{service} denies access to {label}",
                "its policy has to allow these credentials to list and read; to write there: put and delete as well",
            ) from error
        if status is not None and status < 500 and status not in (408, 429):
            raise QkitError(f"{service} refuses {label}: {code or status}", _first_line(error)) from error
        raise Passing(f"{service} answered {status} {code}".rstrip() if status else _broken(error)) from error


def _broken(error: Exception) -> str:
    """What became of a request that was not answered."""
    text = str(error)
    for sign, meaning in _BROKEN.items():
        if sign in text:
            return meaning
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _needs_profile() -> bool:
    """Whether credentials can only be in the files of the AWS command line, which obstore does not read."""
    if os.environ.get("AWS_PROFILE"):
        return True
    direct = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
              "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")  # fmt: skip
    if any(os.environ.get(name) for name in direct):
        return False
    return any(Path(f"~/.aws/{name}").expanduser().is_file() for name in ("credentials", "config"))


def _profile(place: Place) -> tuple[Any, str | None]:
    """(what obstore calls for credentials, the profile's region), from boto3."""
    from datetime import datetime, timedelta, timezone

    try:
        import boto3
    except ImportError as error:
        raise QkitError(
            f"{place}: the credentials are in an AWS profile, which needs the package boto3",
            "run: pip install boto3; or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from error
    try:
        session = boto3.Session()
        credentials = session.get_credentials()
    except Exception as error:  # a profile that is not there, a file that is none
        raise QkitError(f"{place}: {_first_line(error)}", _CREDENTIALS["s3"]) from error
    if credentials is None:
        raise QkitError(f"no credentials for S3 were found: {place}", _CREDENTIALS["s3"])

    def fetch() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=10),
        }

    return fetch, session.region_name
