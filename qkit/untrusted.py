"""What strangers wrote, read at a bounded cost: JSON, YAML and patterns; and how it is shown on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

DEEPEST = 64  # levels of a document; configs have a handful
MOST_CONTAINERS = 5_000_000  # lists and objects of a document, of which empty ones take 25 times their text in memory
MAX_YAML_BYTES = 128 << 10  # a parser in Python takes about a second for them
PATTERN_SECONDS = 1.0
# What moves a cursor, colours, or writes right to left.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class SlowPattern(ValueError):
    """A regular expression that backtracks without end."""


def parse_json(text: bytes | str, **how: Any) -> Any:
    """`json.loads`, of UTF-8. Raises ValueError for what is no JSON, for half a surrogate pair, which UTF-8 lacks, for
    more than `MOST_CONTAINERS`, and for values deeper than `DEEPEST`, which whoever walks them could not take."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise ValueError(f"it holds more than {MOST_CONTAINERS} lists and objects")
    try:
        value = json.loads(text, **how)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [child for each in level for child in _children(each)]
    if any(isinstance(each, dict | list) for each in level):
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML document. Raises ValueError for what is none, is longer than `MAX_YAML_BYTES`, or has
    aliases: a few of them, each of several more, stand for more than any memory holds."""
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has {len(text)} characters, the most are {MAX_YAML_BYTES}")

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(
                    f"an alias (*{self.peek_event().anchor}), which is not read here: write the value again"
                )
            return super().compose_node(parent, index)

    loader = None
    try:
        loader = Loader(text)
        return loader.get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        # Beside its own errors those of the constructors of numbers, dates and bytes.
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> Any:
    """A regular expression, in the syntax of `re`. Raises ValueError for what is none."""
    import regex

    try:
        re.compile(pattern)  # the syntax that those who write configs mean
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(str(error)) from None


def matches(pattern: str, text: str) -> bool:
    """`re.match`. Raises `SlowPattern` where that takes longer than any pattern on names should."""
    try:
        return compiled(pattern).match(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise SlowPattern(f"the pattern {pattern[:200]!r} takes more than {PATTERN_SECONDS:g} s for one name") from None


def printable(text: str) -> str:
    """A text with what would steer the terminal as escapes."""
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
