"""A server that speaks OpenAI's streaming interface as a test tells it to: well, slowly, falsely, or not to the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny"


@dataclass
class Script:
    """How one request is answered. after: seconds before the first token; between: before each further one;
    tokens: how many, by default those asked for; cut: the connection ends after so many chunks; raw: sent as it is
    in place of a stream; hang: nothing at all is sent for so many seconds."""

    status: int = 200
    body: Any = None
    after: float = 0.0
    between: float = 0.0
    tokens: int | None = None
    a_chunk: int = 1
    cut: int | None = None
    usage: int | bool = True
    finish: str | None = "length"
    done: bool = True
    model: str = MODEL
    raw: bytes | None = None
    hang: float = 0.0
    close: bool = False
    json: bool = False
    error_after: int | None = None


@dataclass
class Server:
    """script(n, body): how the n-th request for a completion, from 0, is answered. served: their bodies and headers."""

    script: Callable[[int, dict[str, Any]], Script]
    routes: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions")
    models: Any = None
    key: str | None = None
    served: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most: int = 0
    tokens_of: Callable[[str], int] = lambda text: len(text) // 5
    last: int | None = None  # after that many requests for a completion the server is gone

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.under_way = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *given: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.get(self)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.served)
                    outer.served.append(body)
                    outer.paths.append(self.path)
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                try:
                    outer.post(self, number, body)
                except ConnectionError:
                    pass
                finally:
                    outer.over(self)
                    self.close_connection = True

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *given: Any) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def stop(self) -> None:
        """Gone: a connection is refused from now on; what is under way goes on."""
        self.http.shutdown()
        self.http.server_close()

    def over(self, handler: BaseHTTPRequestHandler) -> None:
        """A request is under way no more; once, however often it is said."""
        with self.lock:
            self.under_way -= not getattr(handler, "is_over", False)
            handler.is_over = True  # type: ignore[attr-defined]

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            self.answer(handler, 401, {"error": {"message": "no such key"}})
        elif handler.path != "/v1/models":
            self.answer(handler, 404, {"detail": "Not Found"})
        else:
            self.answer(handler, 200, {"data": [{"id": MODEL}]} if self.models is None else self.models)

    def answer(self, handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        data = json.dumps(body).encode() if not isinstance(body, bytes) else body
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def post(self, handler: BaseHTTPRequestHandler, number: int, body: dict[str, Any]) -> None:
        if self.last is not None and number >= self.last:
            if number == self.last:
                self.stop()
            return
        if handler.path not in self.routes:
            return self.answer(handler, 404, {"detail": "Not Found"})
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self.answer(handler, 401, {"error": {"message": "no such key"}})
        how = self.script(number, body)
        if how.hang:
            time.sleep(how.hang)
            return None
        if how.close:
            return None
        if how.status != 200 or how.json:
            return self.answer(handler, how.status, how.body)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        if how.raw is not None:
            self.send(handler, how.raw)
            self.send(handler, b"")
            return None
        self.stream(handler, how, body)
        return None

    def stream(self, handler: BaseHTTPRequestHandler, how: Script, body: dict[str, Any]) -> None:
        chat = "messages" in body
        count = body["max_tokens"] if how.tokens is None else how.tokens
        prompt = body["messages"][0]["content"] if chat else body["prompt"]

        def event(text: str | None, finish: str | None = None) -> None:
            part = {"delta": {"content": text} if text is not None else {}} if chat else {"text": text or ""}
            choice = {"index": 0, "finish_reason": finish, **part}
            self.send_event(handler, {"model": how.model, "choices": [choice]})

        if chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            self.send_event(handler, {"model": how.model, "choices": [first]})
        sent = 0
        while sent < count:
            time.sleep(how.between if sent else how.after)
            if how.cut is not None and sent >= how.cut:
                handler.connection.shutdown(2)
                return
            if how.error_after is not None and sent >= how.error_after:
                self.send_event(handler, {"error": {"message": "the engine is dead"}})
                break
            sent += how.a_chunk
            event("w" * how.a_chunk)
        if how.finish is not None:
            event(None, how.finish)
        if how.usage is not False and body.get("stream_options", {}).get("include_usage"):
            said = count if how.usage is True else how.usage
            usage = {"prompt_tokens": self.tokens_of(prompt), "completion_tokens": said}
            self.send_event(handler, {"model": how.model, "choices": [], "usage": usage})
        self.over(handler)  # before the client hears of it, and asks again
        if how.done:
            self.send(handler, b"data: [DONE]\n\n")
        self.send(handler, b"")

    def send_event(self, handler: BaseHTTPRequestHandler, event: dict[str, Any]) -> None:
        self.send(handler, b"data: " + json.dumps(event).encode() + b"\n\n")

    def send(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.wfile.flush()


def good(number, body) -> Script:
    return Script()
