"""Text that every machine has, and a sketch that tells whether two texts share a passage.

The default texts come out of the running CPython: the language reference behind `help()` to calibrate on,
docstrings of the standard library to evaluate on. They change with the Python version, so each carries its
version in the name and its sha256.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, zip_longest
from pathlib import Path

from ..errors import QkitError

SKETCH_KIND = "winnow-blake2b64"

# Modules whose docstrings read as prose, present in every supported Python. Those that the language
# reference quotes at length (pdb, string) are left out; what is still shared is dropped by `overlap`.
_EVALUATION_MODULES = (
    "argparse.py", "asyncio/tasks.py", "codecs.py", "collections/__init__.py", "configparser.py", "difflib.py",
    "email/message.py", "fractions.py", "http/cookiejar.py", "inspect.py", "ipaddress.py", "json/__init__.py",
    "logging/__init__.py", "shutil.py", "smtplib.py", "socketserver.py", "statistics.py", "subprocess.py",
    "textwrap.py", "threading.py", "timeit.py", "traceback.py", "turtle.py", "urllib/parse.py", "wave.py",
)  # fmt: skip

# A word is a run of letters and digits; scripts written without spaces count one word per character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_HASH = struct.Struct("<Q")


@dataclass(frozen=True)
class NamedText:
    """A text, what to call it, and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class Overlap:
    """What a text shares with a sketched one.

    count     word n-grams of the text whose hash is in the sketch
    fraction  share of the text's words that lie in one of them (0 .. 1)
    example   the first shared passage, as it stands in the text ("" where there is none)
    """

    count: int
    fraction: float
    example: str


def _named(name: str, text: str) -> NamedText:
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return NamedText(f"cpython-{version}/{name}", text, hashlib.sha256(text.encode()).hexdigest())


@cache
def calibration_text() -> NamedText:
    """The embedded calibration text: the Python language reference, about 350 thousand characters.

    Raises QkitError where this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise QkitError(
            "this Python has no pydoc_data, the default calibration text", "name a text file with --calib FILE"
        ) from None
    seen: set[str] = set()
    parts = []
    for topic in sorted(topics):
        for paragraph in _paragraphs(topics[topic]):
            if paragraph not in seen:  # topics quote each other
                seen.add(paragraph)
                parts.append(paragraph)
    return _named("language-reference", "\n\n".join(parts) + "\n")


@cache
def evaluation_text() -> NamedText:
    """The embedded evaluation text: docstrings of the standard library that share no passage with
    `calibration_text`, about 270 thousand characters.

    Raises QkitError where the library's source files are not on this machine.
    """
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    known = sketch(calibration_text().text)
    modules = [_docstrings((root / m).read_bytes()) for m in _EVALUATION_MODULES if (root / m).is_file()]
    seen: set[str] = set()
    parts = []
    for docstring in chain.from_iterable(zip_longest(*modules, fillvalue="")):  # so that any prefix is varied
        cleaned = "\n\n".join(p for p in _paragraphs(docstring) if p not in seen)
        seen.update(cleaned.split("\n\n"))
        if len(cleaned) >= 120 and overlap(known, cleaned).count == 0:
            parts.append(cleaned)
    if not parts:
        raise QkitError(
            f"the standard library's source files are not under {root}, so there is no default evaluation text",
            "name a text file with --text FILE",
        )
    return _named("library-docstrings", "\n\n".join(parts) + "\n")


def _docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module in source order; the module is parsed, never imported."""
    import ast

    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in nodes:
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs without rst marks, prose unwrapped to one line each, code kept line by line."""
    for block in re.split(r"\n[ \t]*\n", text.expandtabs()):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        lines = [line for line in lines if re.search(r"\w", line) and "::=" not in line]  # rules, grammar
        if not lines:
            continue
        whole = " ".join(line.strip() for line in lines)
        sentence = re.match(r"(\* )?[A-Z]", whole) and whole.endswith((".", ":", ")"))
        table = any(re.search(r"\S {3,}\S", line) for line in lines)
        code = whole.startswith((">>>", "...")) or (lines[-1].startswith(" ") and not sentence)
        if len(lines) > 1 and (code or table):
            yield "\n".join(lines)
        else:
            prose = re.sub(r"(?<!\w)(\*{1,2}|`{1,2})(\w[^*`\n]*?)\1(?!\w)", r"\2", whole)  # *emphasis*, ``code``
            yield re.sub(r"::$", ":", prose)


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
    hits = [i for i, h in enumerate(_hashes(words, n)) if h in hashes] if hashes else []
    if not hits:
        return Overlap(0, 0.0, "")
    covered: set[int] = set()
    for i in hits:
        covered.update(range(i, i + n))
    last = hits[0] + n - 1
    while last + 1 in covered:
        last += 1
    return Overlap(len(hits), len(covered) / len(words), text[spans[hits[0]][0] : spans[last][1]])


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
