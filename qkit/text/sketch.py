"""A sketch of a text that tells whether another one shares passages with it."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from ..errors import QkitError

SKETCH_KIND = "winnow-blake2b64"

# A word is a run of letters and digits; scripts written without spaces count one word per character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_HASH = struct.Struct("<Q")


@dataclass(frozen=True)
class Overlap:
    """What a text shares with a sketched one. What the text repeats counts once: the prompt that opens every chat of
    a set is no copy of the chats of another.

    count     word n-grams of the text, each once, whose hash is in the sketch
    fraction  share of the text's words that lie in one of them (0 .. 1), without words in repetitions
    example   the first shared passage, as it stands in the text ("" where there is none)
    """

    count: int
    fraction: float
    example: str


def _hashes(words: list[str], n: int) -> list[int]:
    blake2b = hashlib.blake2b
    unpack = _HASH.unpack
    return [
        unpack(blake2b(" ".join(words[i : i + n]).encode(), digest_size=8).digest())[0]
        for i in range(len(words) - n + 1)
    ]


def sketch(text: str, n: int = 13, window: int = 8) -> str:
    """A fingerprint of `text` in which any passage of n + window - 1 or more words is recognized for certain.

    Winnowing (Schleimer, Wilkerson, Aiken 2003, section 3): of each `window` consecutive hashes of word
    n-grams, the least is kept. Case and punctuation do not count. About 2/(window+1) hashes a word.
    Returns "winnow-blake2b64:n:window:<base64 of sorted little-endian uint64>", fit for a manifest.
    """
    if n < 1 or window < 1:
        raise ValueError(f"n and window must be positive, got {n} and {window}")
    hashes = _hashes(_WORD.findall(text.lower()), n)
    kept = {min(hashes[i : i + window]) for i in range(max(1, len(hashes) - window + 1)) if hashes}
    packed = b"".join(_HASH.pack(h) for h in sorted(kept))
    return f"{SKETCH_KIND}:{n}:{window}:{base64.b64encode(packed).decode()}"


def overlap(sketch: str, text: str) -> Overlap:
    """What `text` shares with the text that `sketch` was made of: every passage of n + window - 1 words is
    found, shorter ones of at least n words sometimes. Raises QkitError for a sketch that cannot be read.
    """
    n, hashes = _parse(sketch)
    spans = [m.span() for m in _WORD.finditer(text)]
    words = [text[a:b].lower() for a, b in spans]
    first: dict[int, int] = {}  # where each n-gram stands first
    for i, h in enumerate(_hashes(words, n)):
        first.setdefault(h, i)
    hits = [i for h, i in first.items() if h in hashes]
    if not hits:
        return Overlap(0, 0.0, "")
    covered, fresh = ({k for i in places for k in range(i, i + n)} for places in (hits, first.values()))
    last = hits[0] + n - 1
    while last + 1 in covered:
        last += 1
    return Overlap(len(hits), len(covered) / len(fresh), text[spans[hits[0]][0] : spans[last][1]])


@lru_cache(maxsize=4)
def _parse(sketch: str) -> tuple[int, frozenset[int]]:
    try:
        kind, n, _window, data = sketch.split(":")
        packed = base64.b64decode(data, validate=True)
        if kind != SKETCH_KIND or len(packed) % _HASH.size or int(n) < 1:
            raise ValueError(kind)
        return int(n), frozenset(h for (h,) in _HASH.iter_unpack(packed))
    except (ValueError, AttributeError):
        raise QkitError(
            f"this is not a text sketch that qkit can read: {str(sketch)[:40]!r}",
            "the manifest was edited or written by a newer qkit",
        ) from None
