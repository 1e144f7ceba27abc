"""What a server takes, found out before the load: its model, its route, its options, and how long a prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import QkitError
from .address import Address, ask
from .prompts import Prompts
from .request import CHAT, COMPLETIONS, Ask, Outcome, prompt_length, send

USAGE = {"stream_options": {"include_usage": True}}
_PROBE = 2000  # characters of the first prompt
_LEAST = 24  # characters: the number that a prompt begins with, and a word
_PER_TOKEN = 4.0  # characters of English, where the server does not say how many tokens a prompt had
_TRIES = 3
_NO_ROUTE = (404, 405, 501)
_FINAL = (400, 401, 403, 404, 405, 413, 422, 501)  # the same request gets the same answer


def find_model(address: Address, name: str | None, timeout: float) -> str:
    """The name to ask for: `name` where the server lists it or lists nothing, the first listed where there is no name.

    Raises QkitError where nobody answers, the key is refused, or the server does not have the model."""
    status, body = ask(address, "/models", timeout)
    if status in (401, 403):
        hint = "put its key into a file and name that with --api-key-file"
        what = "the key" if address.key else "requests without a key"
        raise QkitError(f"the endpoint {address.url} refuses {what}", hint)
    listed = []
    if status == 200 and isinstance(body, dict) and isinstance(body.get("data"), list):
        listed = [row["id"] for row in body["data"] if isinstance(row, dict) and isinstance(row.get("id"), str)]
    if name is None and not listed:
        raise QkitError(
            f"{address.url}/models lists no model (HTTP {status})",
            "the URL usually ends with /v1; or name the model: qkit profile NAME --endpoint URL",
        )
    if name is not None and listed and name not in listed:
        raise QkitError(f"the endpoint has no model {name!r}", "it has " + ", ".join(listed[:10]))
    return name or listed[0]


@dataclass(frozen=True)
class Probed:
    """What the requests of the load are made of. ignore_eos: whether the server took it; warmups: streams, of `sent`
    requests in all."""

    ask: Ask
    prompts: Prompts
    basis: str
    ignore_eos: bool
    warmups: tuple[Outcome, ...]
    sent: int


def probe(address: Address, model: str, text: str, context: int, max_tokens: int, timeout: float) -> Probed:
    """Settle the route, the options and the prompts with warm-up requests of which no figure is kept.

    The last of them is as large as those of the load. Raises QkitError where the server serves none."""
    outcomes: list[Outcome] = []
    per_token = _PER_TOKEN
    basis = f"{per_token:g} characters a token, a guess: the server does not say how many tokens a prompt had"
    length = min(_PROBE, max(_LEAST, round(per_token * context)))
    prompts = Prompts(text, length)
    shape, probed = _first(address, model, prompts, timeout, outcomes)
    asked = 0
    full = replace(shape, max_tokens=max_tokens, more=_more(shape, max_tokens))
    for _ in range(2):  # the second time by what the full length gave
        said = probed.prompt_tokens
        if said is None and asked == 0:
            said, asked = prompt_length(address, shape, prompts[0], timeout), 1
        if said:
            per_token = length / said
            basis = f"{per_token:.2f} characters a token, as the server counted a prompt of {said:,}"
        length = max(_LEAST, round(per_token * context))
        prompts = Prompts(text, length)
        probed = _once(address, full, prompts, timeout, outcomes)
        if not probed.prompt_tokens or abs(probed.prompt_tokens - context) <= max(8, context // 100):
            break
    return Probed(full, prompts, basis, "ignore_eos" in full.more, tuple(outcomes), len(outcomes) + asked)


def _more(shape: Ask, max_tokens: int) -> dict[str, object]:
    """`min_tokens` follows max_tokens, where it is sent."""
    return shape.more | ({"min_tokens": max_tokens} if "min_tokens" in shape.more else {})


def _shapes(model: str) -> Sequence[Ask]:
    """Requests to try, the best first: the bare route, which adds no template, before that of chats; with what makes
    a server ignore the end of text, and say its usage, before without."""
    tokens = 8
    whole = {"ignore_eos": True, "min_tokens": tokens}
    return [Ask(route, model, tokens, more) for route in (COMPLETIONS, CHAT) for more in (USAGE | whole, USAGE, {})]


def _first(
    address: Address, model: str, prompts: Prompts, timeout: float, outcomes: list[Outcome]
) -> tuple[Ask, Outcome]:
    """The first shape that the server takes, with what it answered.

    Raises QkitError with the words of the first route that is there, at its plainest."""
    shapes = list(_shapes(model))
    refused: Outcome | None = None
    while shapes:
        shape = shapes.pop(0)
        outcome = _tried(address, shape, prompts, timeout, outcomes)
        if outcome.reason is None:
            return shape, outcome
        if refused is None or refused.status in _NO_ROUTE or shape.route == COMPLETIONS:
            refused = outcome
        if outcome.status in _NO_ROUTE:
            shapes = [s for s in shapes if s.route != shape.route]
        elif outcome.status not in (400, 422):  # not a matter of the request's shape
            break
    assert refused is not None
    raise _refusal(address, refused)


def _once(address: Address, shape: Ask, prompts: Prompts, timeout: float, outcomes: list[Outcome]) -> Outcome:
    outcome = _tried(address, shape, prompts, timeout, outcomes)
    if outcome.reason is not None:
        raise _refusal(address, outcome)
    return outcome


def _tried(address: Address, shape: Ask, prompts: Prompts, timeout: float, outcomes: list[Outcome]) -> Outcome:
    """The outcome of a request, sent again where it failed for what the server may recover from."""
    for _ in range(_TRIES):
        outcome = send(address, shape, prompts[len(outcomes)], timeout)
        outcomes.append(outcome)
        if outcome.reason is None or outcome.reason == "connection refused" or outcome.status in _FINAL:
            break
    return outcome


def _refusal(address: Address, outcome: Outcome) -> QkitError:
    hint = "look at the server's log"
    if outcome.status in (401, 403):
        hint = "put its key into a file and name that with --api-key-file"
    elif outcome.status in (400, 413, 422):
        hint = "a smaller --context or --max-tokens may help"
    elif outcome.reason == "timeout":
        hint = "give it more time with --timeout"
    words = f": {outcome.message}" if outcome.message else ""
    return QkitError(f"the endpoint {address.url} serves no request: {outcome.reason}{words}", hint)
