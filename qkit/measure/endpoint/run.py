"""A load test of a running server that speaks OpenAI's interface: concurrency by concurrency, until one breaks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import QkitError
from ...progress import notify, track
from ...text.defaults import evaluation_text
from ...text.read import read_text
from . import load, probe
from .address import Address, parse
from .request import TOKENS_A_CHUNK, Ask, Outcome, send
from .types import Endpoint, Level

CONCURRENCY = (1, 2, 4, 8, 16, 32)
CONTEXT = 512
MAX_TOKENS = 64
LEAST = 8  # requests at a level, and at least twice its concurrency
LEVEL_SECONDS = 60.0
TIMEOUT = 300.0

FORMULAS = {
    "request": "one streaming completion, greedy, on a connection of its own that is open before the clock starts; "
    "prompts begin with a number drawn by chance, so that no cache of prefixes helps",
    "concurrency": "requests under way at any time: each begins as soon as another has ended",
    "output tok/s": "output tokens of requests that succeeded / time from the first request sent to the last one ended",
    "full load tok/s": "the same until the first connection finds no request left to send: the level's end, where "
    "fewer are under way, does not count",
    "TTFT": "from the request sent to its first token, the wait in the server's queue included",
    "TPOT": "of a request: time from its first to its last token / (tokens - 1)",
    "latency": "from the request sent to the end of its stream",
    "tokens": "the server's usage where it says one, else chunks of the stream that carried text",
    "failed": "no connection, no answer, HTTP errors, timeouts, streams that are cut short or malformed or bring no "
    f"token, and usage that contradicts the stream (more than {TOKENS_A_CHUNK} tokens a chunk, fewer tokens than "
    "chunks, more or fewer than asked for); counted apart, in no other figure",
}


def measure_endpoint(
    url: str,
    *,
    model: str | None = None,
    context: int = CONTEXT,
    max_tokens: int = MAX_TOKENS,
    concurrency: Sequence[int] = CONCURRENCY,
    requests: int | None = None,
    level_seconds: float = LEVEL_SECONDS,
    timeout: float = TIMEOUT,
    text: str | None = None,
    api_key_file: str | None = None,
) -> Endpoint:
    """Measure a running OpenAI-compatible server under load.

    url            its base, such as http://localhost:8000/v1
    model          the name to ask for; default: the first that the server lists
    context        tokens of each prompt, about: by what the server counts, or by characters
    max_tokens     new tokens of each request, exactly where the server takes `ignore_eos` or `min_tokens`
    concurrency    levels, in this order
    requests       at each level, at least its concurrency; default: 8 or twice its concurrency
    level_seconds  after which a level sends no more; those under way are waited for
    timeout        seconds of a request, after which it has failed
    text           what prompts are made of; see `text.read.read_text`
    api_key_file   a file with the key, sent as a bearer token

    A level of which every request fails ends the test; what was measured is kept. Raises QkitError, before any load,
    where the server does not answer, does not have the model, or serves no request.
    """
    if not concurrency:
        raise QkitError("there is no concurrency to measure", "leave --concurrency out to get its default")
    address = parse(url, read_key(api_key_file))
    content = (evaluation_text() if text is None else read_text(text)).content
    name = probe.find_model(address, model, timeout)
    probed = probe.probe(address, name, content, context, max_tokens, timeout)
    counts = [max(size, requests or max(LEAST, 2 * size)) for size in concurrency]
    levels: list[Level] = []
    outcomes: list[Outcome] = []
    problem = None
    with track(f"load on {address.url}", sum(counts), "requests") as advance:
        sent = probed.sent
        for size, count in zip(concurrency, counts, strict=True):
            ran = load.run(_sender(address, probed, timeout, sent), size, count, level_seconds, advance)
            sent += count
            outcomes += ran.outcomes
            levels.append(load.level(ran, size, count))
            if not levels[-1].succeeded:
                most = levels[-1].failed[0]
                problem = f"at concurrency {size} {levels[-1].problem}; {most.count} of them: {most.reason}"
                notify(f"warning: {problem}")
                break
    return Endpoint(
        url=address.url,
        model=name,
        route=probed.ask.route,
        context=context,
        prompt_basis=probed.basis,
        max_tokens=max_tokens,
        ignore_eos=probed.ignore_eos,
        counted=_counted(outcomes),
        warmups=probed.sent,
        warmup_failures=load.failures(probed.warmups),
        levels=tuple(levels),
        unmeasured=tuple(concurrency[len(levels) :]),
        problem=problem,
        provenance=_provenance(),
        formulas=FORMULAS,
        failures=(problem,) if problem else (),
    )


def _sender(address: Address, probed: probe.Probed, timeout: float, offset: int) -> Callable[[int], Outcome]:
    ask: Ask = probed.ask
    return lambda index: send(address, ask, probed.prompts[offset + index], timeout)


def read_key(path: str | None) -> str | None:
    """The key in a file, without the line's end. Raises QkitError where there is none."""
    if path is None:
        return None
    hint = "the file holds the key alone, in one line"
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise QkitError(f"the key's file {path} cannot be read: {getattr(error, 'strerror', error)}", hint) from None
    if not key or not key.isascii() or len(key.split()) != 1:
        raise QkitError(f"the key's file {path} holds no key", hint)
    return key


def _counted(outcomes: Sequence[Outcome]) -> str:
    kinds = sorted({o.counted for o in outcomes if o.reason is None}, reverse=True)
    return " and ".join(kinds) or "nothing"


def _provenance() -> dict[str, str]:
    import platform
    from datetime import datetime, timezone

    from ... import __version__

    return {
        "qkit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def default_name(url: str) -> str:
    """What a report's folder is called for a server."""
    return urlsplit(url).netloc.replace(":", "-") or "endpoint"
