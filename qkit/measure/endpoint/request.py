"""One streaming request: what it brought, when, and why it failed where it did."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from ...untrusted import parse_json
from .address import Address
from .stream import DONE, Broken, Events, Reply, count, message_of

COMPLETIONS, CHAT = "/completions", "/chat/completions"
# The most tokens that one chunk is believed to carry: servers that send in strides or predict several tokens stay
# below; one that says 64 tokens and sends one word does not.
TOKENS_A_CHUNK = 16
_BODY = 64 << 10


@dataclass(frozen=True)
class Ask:
    """How requests to this server look. more: fields beside those that every server takes."""

    route: str
    model: str
    max_tokens: int
    more: dict[str, Any]

    def body(self, prompt: str) -> bytes:
        text = {"prompt": prompt} if self.route == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
        body = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0, "stream": True, **text}
        return json.dumps(body | self.more).encode()


@dataclass(frozen=True)
class Outcome:
    """Times in seconds of time.perf_counter. reason, message: None and "" where it succeeded.

    connected     seconds that opening the connection took
    sent          when the request went out, the connection open
    arrivals      when each chunk with a token or more came
    ended         when the stream, or what there was of it, ended
    tokens        new tokens: by the server's usage where it says one (`counted` is "usage"), else the chunks
    status        of HTTP; None where there was no answer
    """

    connected: float
    sent: float
    ended: float
    arrivals: tuple[float, ...] = ()
    tokens: int = 0
    counted: str = "chunks"
    prompt_tokens: int | None = None
    early: bool = False
    status: int | None = None
    reason: str | None = None
    message: str = ""

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """None where everything came in one chunk: there is no time between tokens then."""
        if self.tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)

    @property
    def latency(self) -> float:
        return self.ended - self.sent


def send(address: Address, ask: Ask, prompt: str, timeout: float) -> Outcome:
    """Send one request, on a connection of its own, and follow its stream. Raises nothing that a server can cause.

    timeout: seconds from the connection's begin to the stream's end."""
    began = time.perf_counter()
    deadline = began + timeout
    out = Outcome(0.0, began, began)
    try:
        connection = address.connect(timeout)
    except OSError as error:
        late = isinstance(error, TimeoutError)
        refused = isinstance(error, ConnectionRefusedError)
        reason = "timeout" if late else "connection refused" if refused else "no connection"
        return replace(out, ended=time.perf_counter(), reason=reason, message=str(error))
    out = replace(out, connected=time.perf_counter() - began)
    reply, response, socket = Reply(), None, connection.sock
    try:
        headers = {**address.headers(), "Content-Type": "application/json"}
        body = ask.body(prompt)
        out = replace(out, sent=time.perf_counter())
        connection.request("POST", address.path + ask.route, body, headers)
        response = connection.getresponse()
        out = replace(out, status=response.status)
        if response.status != 200:
            raise Broken(f"HTTP {response.status}", _message(response))
        _follow(socket, response, reply, deadline, most=_most_chunks(ask))
        _believe(reply, ask)
    except Broken as error:
        out = replace(out, reason=error.reason, message=str(error))
    except TimeoutError:
        words = f"{len(reply.arrivals)} chunks came in {timeout:g} s" if out.status else f"no answer in {timeout:g} s"
        out = replace(out, reason="timeout", message=words)
    except (http.client.RemoteDisconnected, ConnectionError, http.client.IncompleteRead) as error:
        # The connection ended: before an answer, or within one.
        reason = "connection closed without an answer" if out.status is None else "stream cut short"
        out = replace(out, reason=reason, message=str(error))
    except (OSError, http.client.HTTPException) as error:
        out = replace(out, reason="malformed answer", message=f"{type(error).__name__}: {error}")
    finally:
        ended = time.perf_counter()
        if response is not None:
            response.close()  # it holds the socket once the connection has let go of it
        connection.close()
    tokens = len(reply.arrivals) if reply.usage is None else reply.usage
    return replace(
        out,
        ended=ended,
        arrivals=tuple(reply.arrivals),
        tokens=tokens,
        counted="chunks" if reply.usage is None else "usage",
        prompt_tokens=reply.prompt_tokens,
        early=tokens < ask.max_tokens and reply.finish == "stop",
    )


def prompt_length(address: Address, ask: Ask, prompt: str, timeout: float) -> int | None:
    """Tokens of a prompt as the server counts them in an answer that is no stream; None where it does not say."""
    body = {**json.loads(ask.body(prompt)), "max_tokens": 1, "stream": False}
    for name in ("stream_options", "min_tokens"):
        body.pop(name, None)
    try:
        connection = address.connect(timeout)
        try:
            headers = {**address.headers(), "Content-Type": "application/json"}
            connection.request("POST", address.path + ask.route, json.dumps(body).encode(), headers)
            found = parse_json(connection.getresponse().read(_BODY))
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError):
        return None
    usage = found.get("usage") if isinstance(found, dict) else None
    return count(usage.get("prompt_tokens")) if isinstance(usage, dict) else None


def _follow(socket: Any, response: http.client.HTTPResponse, reply: Reply, deadline: float, most: int) -> None:
    kind = response.headers.get_content_type()
    if kind == "application/json":
        raise Broken("no stream", message_of(_json(response)) or "the answer is one JSON document")
    events = Events()
    while not reply.done:
        left = deadline - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        socket.settimeout(left)
        part = response.read1(_BODY)
        now = time.perf_counter()
        for data in events.feed(part) if part else events.end():
            reply.take(data, now)
        if len(reply.arrivals) > most:
            raise Broken("more tokens than asked", f"{len(reply.arrivals)} chunks had come, and it went on")
        if not part:
            break
    if not reply.done and reply.finish is None:
        words = f"it ended after {len(reply.arrivals)} chunks, without a reason to finish and without {DONE}"
        raise Broken("stream cut short", words)


def _most_chunks(ask: Ask) -> int:
    """Chunks of text that a request's tokens may come in: one each, and a few that servers add or split."""
    return ask.max_tokens + ask.max_tokens // 10 + 2


def _believe(reply: Reply, ask: Ask) -> None:
    """Raises Broken where a finished stream contradicts itself or the request."""
    chunks, said = len(reply.arrivals), reply.usage
    if not chunks:
        raise Broken("no tokens", f"the stream finished ({reply.finish}) without one; usage says {said}")
    if reply.model is not None and not _same(reply.model, ask.model):
        raise Broken("another model answered", f"{reply.model!r}, where {ask.model!r} was asked for")
    if said is None:
        return
    if said > ask.max_tokens:
        raise Broken("usage is wrong", f"usage says {said} tokens, and {ask.max_tokens} were the most asked for")
    if chunks > _most_chunks(replace(ask, max_tokens=said)):
        raise Broken("usage is wrong", f"usage says {said} tokens, and {chunks} chunks carried some")
    if said > TOKENS_A_CHUNK * chunks:
        raise Broken("usage is wrong", f"usage says {said} tokens, and the stream had {chunks} chunks")
    if said < ask.max_tokens and reply.finish != "stop":
        words = f"{said} of {ask.max_tokens}, and the stream finished for the reason {reply.finish!r}"
        raise Broken("fewer tokens than asked", words)


def _same(answered: str, asked: str) -> bool:
    """Gateways add or drop a prefix, hosts a date: one name within the other is the same model."""
    one, other = answered.lower(), asked.lower()
    return one in other or other in one or one.rpartition("/")[2] == other.rpartition("/")[2]


def _message(response: http.client.HTTPResponse) -> str:
    body = response.read(_BODY)
    try:
        found = message_of(parse_json(body))
    except ValueError:
        found = ""
    return (found or body.decode("utf-8", "replace").strip() or response.reason)[:300]


def _json(response: http.client.HTTPResponse) -> Any:
    try:
        return parse_json(response.read(_BODY))
    except ValueError:
        return None
