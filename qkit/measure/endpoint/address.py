"""Where a server is: its URL, one connection to it, and what it answers to a plain question."""

from __future__ import annotations

import http.client
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...errors import QkitError
from ...untrusted import parse_json

_MOST_BYTES = 8 << 20  # of an answer: gateways list some thousands of models
_EXAMPLE = "write it like http://localhost:8000/v1"


@dataclass(frozen=True)
class Address:
    """A server's base URL in parts. key: sent as a bearer token with every request; in no message and no report."""

    secure: bool
    host: str
    port: int
    path: str
    key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"

    def connect(self, timeout: float) -> http.client.HTTPConnection:
        """An open connection; OSError or http.client's errors where there is none."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout)
        connection.connect()
        return connection

    def headers(self) -> dict[str, str]:
        headers = {"Accept": "text/event-stream, application/json", "Connection": "close"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})


def parse(url: str, key: str | None = None) -> Address:
    """Raises QkitError for what is no http URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise QkitError(f"{url!r} is no URL: {error}", _EXAMPLE) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise QkitError(f"{url!r} is no http URL", _EXAMPLE)
    if parts.query or parts.fragment or parts.username:
        raise QkitError("the endpoint's URL may have a host, a port and a path", _EXAMPLE)
    secure = parts.scheme == "https"
    return Address(secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"), key)


def ask(address: Address, path: str, timeout: float) -> tuple[int, Any]:
    """(status, parsed JSON or None) of a GET. Raises QkitError where nobody answers."""
    try:
        connection = address.connect(timeout)
        try:
            connection.request("GET", address.path + path, headers=address.headers())
            response = connection.getresponse()
            body = response.read(_MOST_BYTES)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        words = (str(error) or type(error).__name__).strip()
        hint = "is the server running, and is this its address? " + _EXAMPLE
        raise QkitError(f"the endpoint {address.url} does not answer: {words}", hint) from None
    try:
        return response.status, parse_json(body)
    except ValueError:
        return response.status, None
