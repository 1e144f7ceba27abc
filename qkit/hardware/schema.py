"""JSON Schema, as much of it as the schemas of profiles/ use, so that the schema that ships is the check that runs.

The keywords are those of draft 2020-12: type, enum, required, properties, additionalProperties, items, minItems,
minLength, pattern, minimum, maximum, exclusiveMinimum, $ref into the same document. Any other one is an error of the
schema's author (KeyError), not passed over.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_WORDS = {
    "object": "an object", "array": "a list", "string": "a text", "number": "a number", "integer": "a whole number",
    "boolean": "true or false", "null": "null",
}  # fmt: skip
_NOTES = {"$schema", "$id", "$defs", "title", "description"}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> Iterator[str]:
    """What is wrong with `value`, each with the path of the field: "prices[0].usd: must be over 0, is -1"."""
    for keyword, argument in schema.items():
        if keyword == "$ref":
            yield from problems(value, _resolve(argument, root), root, at)
        elif keyword not in _NOTES:
            yield from _CHECKS[keyword](value, argument, schema, root, at)


def _resolve(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def _is(value: Any, *types: str) -> bool:
    return any(_TYPES[t](value) for t in types)


def _say(at: str, what: str) -> str:
    return f"{at}: {what}" if at else what


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _type(value: Any, types: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    types = [types] if isinstance(types, str) else types
    if not _is(value, *types) or (isinstance(value, float) and not math.isfinite(value)):
        yield _say(at, f"must be {' or '.join(_WORDS[t] for t in types)}, is {_show(value)}")


def _enum(value: Any, allowed: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if value not in allowed:
        yield _say(at, f"must be one of {', '.join(map(str, allowed))}, is {_show(value)}")


def _required(value: Any, names: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (_say(f"{at}.{name}" if at else name, "is missing") for name in names if name not in value)


def _properties(value: Any, known: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in known.items():
            if name in value:
                yield from problems(value[name], inner, root, f"{at}.{name}" if at else name)


def _additional(value: Any, inner: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    known = schema.get("properties", {})
    for name in sorted(value.keys() - known.keys()):
        path = f"{at}.{name}" if at else name
        if inner is False:
            near = difflib.get_close_matches(name, known, 1)
            yield _say(path, f"is not a field{f'; {near[0]} is' if near else ''}")
        else:
            yield from problems(value[name], inner, root, path)


def _items(value: Any, inner: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, entry in enumerate(value):
            yield from problems(entry, inner, root, f"{at}[{i}]")


def _min_items(value: Any, least: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, list) and len(value) < least:
        yield _say(at, f"must have {least} or more entries, has {len(value)}")


def _min_length(value: Any, least: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, str) and len(value) < least:
        yield _say(at, f"must have {least} or more characters, is {_show(value)}")


def _pattern(value: Any, pattern: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, str) and not re.search(pattern, value):
        yield _say(at, f"must match {pattern}, is {_show(value)}")


def _bound(word: str, ok: Callable[[float, float], bool]) -> Callable[..., Iterator[str]]:
    def check(value: Any, limit: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
        if _is(value, "number") and not ok(value, limit):
            yield _say(at, f"must be {word} {limit}, is {_show(value)}")

    return check


_CHECKS: dict[str, Callable[..., Iterator[str]]] = {
    "type": _type, "enum": _enum, "required": _required, "properties": _properties,
    "additionalProperties": _additional, "items": _items, "minItems": _min_items, "minLength": _min_length,
    "pattern": _pattern, "minimum": _bound("at least", lambda v, x: v >= x),
    "maximum": _bound("at most", lambda v, x: v <= x), "exclusiveMinimum": _bound("over", lambda v, x: v > x),
}  # fmt: skip
