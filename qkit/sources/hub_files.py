"""The files of a repository on the Hub as they lie there: ranged reads of one commit, and nothing in the cache."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ..errors import QkitError
from ..storage.remote import ATTEMPTS_AT_FIRST, Found, Passing, changed, persist
from .hub import asking, wanted

_TIMEOUT = 30.0  # seconds in which something has to arrive
_GOOD_FOR = 300.0  # seconds that a file's address at the Hub's storage is used again; they are signed for longer


class HubObjects:
    """`storage.remote.Objects` of a model's repository: the files that qkit would fetch (`hub.wanted`), or one by name.

    revision  a branch, tag or commit; None: the newest. What is read is the commit that it is now
    everything  also the files that qkit would not fetch

    Raises QkitError as `hub.open_hub`."""

    def __init__(self, repo: str, revision: str | None, everything: bool = False):
        import huggingface_hub

        self.repo, self._revision = repo, revision
        self.label = f"hf://{repo}" + (f"@{revision}" if revision else "")
        self._addresses: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

        def look() -> Any:
            try:
                with asking(repo, revision):
                    return huggingface_hub.HfApi().model_info(
                        repo, revision=revision, files_metadata=True, timeout=_TIMEOUT
                    )
            except QkitError as error:
                status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
                if status is not None and (status >= 500 or status == 429):
                    raise Passing(f"the Hub answered {status}") from error
                raise

        info = persist(f"look at {self.label}", look, ATTEMPTS_AT_FIRST)
        self.commit = str(info.sha)
        sizes = {each.rfilename: each.size for each in info.siblings or ()}
        names = sizes if everything else wanted(sizes)
        self._files = [Found(name, int(size), self.commit) for name in names if (size := sizes[name]) is not None]

    def list(self, folder: str, deep: bool = False) -> list[Found]:
        inside = f"{folder}/" if folder else ""
        below = [found for found in self._files if found.name.startswith(inside)]
        return [found for found in below if deep or "/" not in found.name[len(inside) :]]

    def find(self, name: str) -> Found | None:
        return next((found for found in self._files if found.name == name), None)

    def get(self, found: Found, start: int, end: int) -> Any:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        session = get_session()
        home = hf_hub_url(self.repo, found.name, revision=self.commit, endpoint=constants.ENDPOINT)
        address = self._address(found.name)
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if address is None:  # elsewhere the address itself is signed
            headers |= build_hf_headers()
        label = f"{self.label}/{found.name}"
        broken = sys.modules[type(session).__module__.partition(".")[0]].TransportError
        try:
            with session.stream("GET", address or home, headers=headers, timeout=_TIMEOUT) as answer:
                status = answer.status_code
                if status == 429 or status >= 500:
                    raise Passing(f"the Hub answered {status}", _seconds(answer.headers))
                if status >= 400 and address is not None:
                    self._forget(found.name)
                    raise Passing(f"the Hub's storage answered {status}")
                if status >= 400:
                    answer.read()
                    with asking(self.repo, self._revision):
                        hf_raise_for_status(answer)
                if status != 206 and (start, end) != (0, found.nbytes):
                    raise QkitError(f"{label}: ranged reads are not answered ({status})", "download it: hf download")
                _check_whole(answer.headers.get("Content-Range", ""), found.nbytes, label)
                self._remember(found.name, home, str(answer.url))
                return self._body(answer, end - start)
        except broken as error:
            raise Passing(f"the connection broke ({type(error).__name__})") from error

    @staticmethod
    def _body(answer: Any, nbytes: int) -> bytearray:
        """What arrives of the body, at most `nbytes`."""
        data = bytearray(nbytes)
        done = 0
        for chunk in answer.iter_raw():
            taken = min(len(chunk), nbytes - done)
            data[done : done + taken] = chunk[:taken]
            done += taken
        return data if done == nbytes else data[:done]

    def _address(self, name: str) -> str | None:
        """Where the Hub sent the last reader of a file: asking it each time would be counted, and throttled."""
        with self._lock:
            address, since = self._addresses.get(name, ("", 0.0))
        return address if address and time.monotonic() - since < _GOOD_FOR else None

    def _remember(self, name: str, home: str, address: str) -> None:
        with self._lock:
            if urlsplit(address).netloc != urlsplit(home).netloc and self._addresses.get(name, ("",))[0] != address:
                self._addresses[name] = (address, time.monotonic())

    def _forget(self, name: str) -> None:
        with self._lock:
            self._addresses.pop(name, None)

    def put(self, name: str, data: bytes | bytearray) -> None:
        self._refuse()

    def put_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        self._refuse()

    def upload(self, name: str, parts: Iterator[bytearray], part_bytes: int) -> None:
        self._refuse()

    def delete(self, name: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise QkitError(f"qkit does not write to the Hub: {self.label}", "write a folder and use: hf upload")


def _seconds(headers: Any) -> float | None:
    """How long a server that is asked too often wants to be left alone: Retry-After, or the Hub's own t=."""
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    fields = [field.strip() for field in headers.get("RateLimit", "").split(";")]
    waits = [field[2:] for field in fields if field.startswith("t=") and field[2:].isdigit()]
    return float(waits[0]) if waits else None


def _check_whole(content_range: str, nbytes: int, label: str) -> None:
    """Raises QkitError where the file behind an answer has another size."""
    total = content_range.rpartition("/")[2]
    if total.isdigit() and int(total) != nbytes:
        raise changed(label)
