"""JSON Schema, as much of it as the schemas of profiles/ use, so that the schema that ships is the check that runs.

The keywords are those of draft 2020-12: type, enum, required, properties, additionalProperties, items, minItems,
minLength, pattern, minimum, maximum, exclusiveMinimum, anyOf, $ref into the same document. Any other one is an error of
the schema's author (KeyError), not passed over.
"""

from __future__ import annotations

import difflib
import json
import operator
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any


def _is_number(value: Any) -> bool:
    """Of JSON, and one that a float can hold: json reads 1e999 as infinite, and whole numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # NaN is not


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": _is_number,
    "integer": lambda v: _is_number(v) and v == int(v),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_WORDS = {
    "object": "an object", "array": "a list", "string": "a text", "number": "a number", "integer": "a whole number",
    "boolean": "true or false", "null": "null",
}  # fmt: skip
_NOTES = {"$schema", "$id", "$defs", "title", "description"}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """What is wrong with `value`, each with the path of the field: "prices[0].usd: must be over 0, is -1"."""
    found: list[str] = []
    for keyword, argument in schema.items():
        if keyword == "$ref":
            found += problems(value, _resolve(argument, root), root, at)
        elif keyword not in _NOTES:
            found += _CHECKS[keyword](value, argument, schema, root, at)
    return found


def _resolve(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def _say(at: str, what: str) -> tuple[str]:
    return (f"{at}: {what}" if at else what,)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _type(value: Any, types: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    names = (types,) if isinstance(types, str) else types
    for name in names:
        if _TYPES[name](value):
            return ()
    return _say(at, f"must be {' or '.join(_WORDS[name] for name in names)}, is {_show(value)}")


def _enum(value: Any, allowed: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    return () if value in allowed else _say(at, f"must be one of {', '.join(map(str, allowed))}, is {_show(value)}")


def _required(value: Any, names: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    return [f"{_inner(at, name)}: is missing" for name in missing]


def _properties(value: Any, known: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    present = [name for name in known if name in value] if isinstance(value, dict) else []
    return [text for name in present for text in problems(value[name], known[name], root, _inner(at, name))]


def _additional(value: Any, inner: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    known = schema.get("properties", {})
    others = sorted(value.keys() - known.keys()) if isinstance(value, dict) else []
    if inner is not False:
        return [text for name in others for text in problems(value[name], inner, root, _inner(at, name))]
    found = []
    for name in others:
        near = difflib.get_close_matches(name, known, 1)
        found.append(f"{_inner(at, name)}: is not a field{f'; {near[0]} is' if near else ''}")
    return found


def _inner(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _items(value: Any, inner: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    entries = enumerate(value) if isinstance(value, list) else ()
    return [text for i, entry in entries for text in problems(entry, inner, root, f"{at}[{i}]")]


def _min_items(value: Any, least: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    short = isinstance(value, list) and len(value) < least
    return _say(at, f"must have {least} or more entries, has {len(value)}") if short else ()


def _min_length(value: Any, least: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    short = isinstance(value, str) and len(value) < least
    return _say(at, f"must have {least} or more characters, is {_show(value)}") if short else ()


def _pattern(value: Any, pattern: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    wrong = isinstance(value, str) and not re.search(pattern, value)
    return _say(at, f"must match {pattern}, is {_show(value)}") if wrong else ()


def _any_of(value: Any, branches: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
    """What is wrong with it as the branch that it is nearest to."""
    return min((problems(value, branch, root, at) for branch in branches), key=len)


def _bound(word: str, ok: Callable[[float, float], bool]) -> Callable[..., Iterable[str]]:
    def check(value: Any, limit: Any, schema: Any, root: Any, at: str) -> Iterable[str]:
        wrong = _TYPES["number"](value) and not ok(value, limit)
        return _say(at, f"must be {word} {limit}, is {_show(value)}") if wrong else ()

    return check


_CHECKS: dict[str, Callable[..., Iterable[str]]] = {
    "type": _type, "enum": _enum, "required": _required, "properties": _properties,
    "additionalProperties": _additional, "items": _items, "minItems": _min_items, "minLength": _min_length,
    "pattern": _pattern, "minimum": _bound("at least", operator.ge), "maximum": _bound("at most", operator.le),
    "exclusiveMinimum": _bound("over", operator.gt), "anyOf": _any_of,
}  # fmt: skip
