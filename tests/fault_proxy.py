"""A proxy before a server that answers over HTTP: it counts what goes through, and spoils what a test says."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "server", "date"}


@dataclass(frozen=True)
class Fault:
    """What becomes of one answer.

    status  this one is sent in place of what was asked for, which the server never sees
    code    what its body calls it
    refuse  the connection is closed before the server sees the request
    lost    the server sees it and does it; the connection is closed in place of the answer
    drop    the connection is reset after that share of the body
    short   only that share of the body is sent, as if it were all
    delay   seconds before the answer"""

    status: int | None = None
    code: str = "SlowDown"
    refuse: bool = False
    lost: bool = False
    drop: float | None = None
    short: float | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request and what was sent back. received: bytes of its body; sent: bytes of the answer's."""

    method: str
    path: str
    range: str | None
    status: int
    received: int
    sent: int


@dataclass
class Proxy:
    """upstream: "http://host:port"; faults(n, method, path): what becomes of the n-th request, from 0.

    request(path, headers), response(headers): change what is passed on, headers in place; the first gives the path
    that is asked for upstream."""

    upstream: str
    faults: Callable[[int, str, str], Fault | None] = lambda n, method, path: None
    request: Callable[[str, dict[str, str]], str] = lambda path, headers: path
    response: Callable[[dict[str, str]], None] = lambda headers: None
    seen: list[Seen] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.seen, self.count = [], 0

    def sent(self, ending: str = "") -> int:
        """Bytes of bodies sent for paths that end so."""
        with self.lock:
            return sum(s.sent for s in self.seen if s.method == "GET" and s.path.partition("?")[0].endswith(ending))


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as a test says</Message></Error>".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _any(self) -> None:
        proxy = self.proxy
        with proxy.lock:
            n, proxy.count = proxy.count, proxy.count + 1
        fault = proxy.faults(n, self.command, self.path) or Fault()
        body = self._body()
        time.sleep(fault.delay)
        if fault.refuse:
            return self._reset(body, 0)
        if fault.status is not None:
            return self._answer(fault.status, {"Content-Type": "application/xml"}, _error(fault.code), body)
        status, headers, data = self._forward(body)
        if fault.lost:
            return self._reset(body, status)
        if fault.short is not None:
            data = data[: int(len(data) * fault.short)]
        self._answer(status, headers, data, body, fault.drop)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        there = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP and k.lower() != "expect"}
        path = self.proxy.request(self.path, headers)
        headers["Content-Length"] = str(len(body))
        try:
            there.request(self.command, path, body, headers)
            answer = there.getresponse()
            data = answer.read()
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
            self.proxy.response(kept)
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, kept, data
        finally:
            there.close()

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, body: bytes, drop: float | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        sent = data if drop is None else data[: int(len(data) * drop)]
        self._note(body, status, 0 if self.command == "HEAD" else len(sent))
        if self.command != "HEAD":
            try:
                self.wfile.write(sent)
            except OSError:  # the client has gone
                self.close_connection = True
        if drop is not None:
            self._close()

    def _reset(self, body: bytes, status: int) -> None:
        self._note(body, status, 0)
        self._close()

    def _note(self, body: bytes, status: int, sent: int) -> None:
        with self.proxy.lock:
            found = Seen(self.command, self.path, self.headers.get("Range"), status, len(body), sent)
            self.proxy.seen.append(found)

    def _close(self) -> None:
        """End the connection in the middle of what was promised."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass
