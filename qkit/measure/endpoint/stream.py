"""Server-sent events of a completion, taken apart: bytes and the times they came in, tokens and usage out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...untrusted import parse_json

DONE = "[DONE]"
_LONGEST = 16 << 20  # bytes of an event: a chunk has a few hundred
_MOST_TOKENS = 1 << 40  # that a server is believed to count


class Broken(Exception):
    """What came is no stream of completions. reason: its kind, as failures are counted; the message is of this one."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Events:
    """The data of each event, from bytes cut anywhere (the event-stream format of the HTML standard)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[str]:
        """Data of the events that `part` completes."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(self._take())
            elif line and b":" not in line:  # a field of the format has a colon after its name
                raise Broken("malformed stream", f"a line that is no event: {line[:100]!r}")
        if len(self._rest) + sum(map(len, self._data)) > _LONGEST:
            raise Broken("malformed stream", f"an event of more than {_LONGEST} bytes")
        return found

    def end(self) -> list[str]:
        """At the end of the stream: an event that only its blank line is missing of."""
        if self._rest.startswith(b"data:"):
            self._data.append(self._rest[5:].strip())
        return [self._take()] if self._data else []

    def _take(self) -> str:
        data, self._data = b"\n".join(self._data), []
        return data.decode("utf-8", "replace")


@dataclass
class Reply:
    """What one stream has said so far. arrivals: the time of each chunk that carried a token or more."""

    arrivals: list[float] = field(default_factory=list)
    finish: str | None = None
    usage: int | None = None
    prompt_tokens: int | None = None
    model: str | None = None
    done: bool = False

    def take(self, data: str, now: float) -> None:
        """One event. Raises Broken where it is none of a completion, or says that something failed."""
        if data.strip() == DONE:
            self.done = True
            return
        try:
            event = parse_json(data)
        except ValueError:
            raise Broken("malformed stream", f"an event that is no JSON: {data[:100]!r}") from None
        if not isinstance(event, dict):
            raise Broken("malformed stream", f"an event that is no object: {data[:100]!r}")
        if event.get("error"):
            raise Broken("error in the stream", message_of(event) or data[:200])
        if isinstance(event.get("model"), str):
            self.model = event["model"]
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage = count(usage.get("completion_tokens"))
            self.prompt_tokens = count(usage.get("prompt_tokens"))
        choices = event.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise Broken("malformed stream", f"an event without choices: {data[:100]!r}")
        for choice in choices[:1]:
            finish = choice.get("finish_reason")
            if _carries(choice, finish):
                self.arrivals.append(now)
            self.finish = finish if finish and isinstance(finish, str) else self.finish


def _carries(choice: dict[str, Any], finish: Any) -> bool:
    """Whether a chunk brings a token. One without text may: half a character, or a special token. Not the chunk that
    only opens a chat, or only closes a stream."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
    return bool(choice.get("text")) or ("text" in choice and not finish)


def count(value: Any) -> int | None:
    """A number of tokens as a server says it; None where that is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS else None


def message_of(body: Any) -> str:
    """The message in an error's JSON, in the shapes that servers give it; "" where there is none."""
    if isinstance(body, str):
        return body
    if isinstance(body, list):
        return message_of(body[0]) if body else ""
    if isinstance(body, dict):
        named = [body[name] for name in ("error", "message", "detail", "msg") if name in body]
        return next((found for found in map(message_of, named) if found), "")
    return ""
