"""An option is defined once, as a field of a frozen dataclass; the command line, the keyword arguments of the public
function, its signature and documentation, and the identity of a result are made from that definition.

    @dataclass(frozen=True)
    class Options:
        calib_len: int = option(512, "tokens per window", parse=whole(16), metavar="N")

    @with_options(Options)
    def convert(source: str, options: Options) -> Result: ...     # convert("demo", calib_len=256)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from . import units
from .errors import QkitError

T = TypeVar("T")
Parse = Callable[[Any, str], Any]
_KEY = "qkit.option"


@dataclasses.dataclass(frozen=True)
class _Spec:
    help: str
    parse: Parse
    metavar: str | None
    short: str | None
    identity: bool
    command_line: bool


def option(
    default: Any,
    help: str,
    *,
    parse: Parse | None = None,
    metavar: str | None = None,
    short: str | None = None,
    identity: bool = False,
    command_line: bool = True,
) -> Any:
    """A dataclass field that is an option.

    default       False: a flag; True: a flag that is on, and `--no-NAME` on the command line; a tuple: several values
    help          one phrase; the default is appended where it says something, "do not" put before it for `--no-NAME`
    parse         (value, name on the command line) -> value, raising QkitError: it gets strings from the command line
                  and anything from Python, never None; default: by the default's type
    short         another name, such as "-o"
    identity      whether the value decides the bytes of the result
    command_line  False: a keyword argument alone
    """
    if parse is None:
        parse = flag if isinstance(default, bool) else several(text) if isinstance(default, tuple) else text
    spec = _Spec(help, parse, metavar, short, identity, command_line)
    return dataclasses.field(default=default, metadata={_KEY: spec})


def text(value: Any, name: str) -> str:
    """A string or a path."""
    if not isinstance(value, str | os.PathLike):
        raise QkitError(f"{name} must be text, not {value!r}")
    found = os.fspath(value)
    if not isinstance(found, str) or not found or "\0" in found:
        raise QkitError(f"{name} must be text, not {found!r}", "leave the option out to get its default")
    return found


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise QkitError(f"{name} must be True or False, not {value!r}")
    return value


def whole(least: int, most: int = 2**31 - 1) -> Parse:
    """A whole number from `least` to `most`."""

    def parse(value: Any, name: str) -> int:
        try:
            number = int(value.replace("_", "")) if isinstance(value, str) else value.__index__()
        except (ValueError, AttributeError):
            number = None
        if number is None or isinstance(value, bool):
            raise QkitError(f"{name}: {str(value)[:60]!r} is not a whole number", f"write it like {max(least, 64)}")
        if number < least:
            raise QkitError(f"{name} must be at least {least}, not {number}")
        if number > most:
            raise QkitError(f"{name} must be at most {most}, not {value}")
        return int(number)

    return parse


def number(value: Any, name: str) -> float:
    """A finite number from 0 up."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise QkitError(f"{name} must be a number from 0 up, not {value!r}")
    return found


def positive(value: Any, name: str) -> float:
    """A finite number above 0."""
    found = number(value, name)
    if not found:
        raise QkitError(f"{name} must be above 0")
    return found


def size(value: Any, name: str) -> int:
    """Bytes: a whole number, or text such as 8GiB."""
    found = units.parse_size(value, name) if isinstance(value, str) else value
    return int(whole(1, 2**63 - 1)(found, name))


def several(parse: Parse, least: int = 0) -> Parse:
    """A tuple of `least` elements or more, each through `parse`; a single value is a tuple of one."""

    def parse_all(value: Any, name: str) -> tuple[Any, ...]:
        given = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
        if len(given) < least:
            raise QkitError(f"{name} takes {least} or more values, not {len(given)}")
        return tuple(parse(each, name) for each in given)

    return parse_all


def flag_name(field: dataclasses.Field[Any]) -> str:
    """The option's name on the command line: calib_len -> "--calib-len"; verify, a flag that is on -> "--no-verify"."""
    return f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """The command line of a class of options. What is not given is left out of the namespace."""
    for field in _fields(cls):
        spec = _spec(field)
        if not spec.command_line:
            continue
        names = [*([spec.short] if spec.short else []), flag_name(field)]
        help = ("do not " if field.default is True else "") + _described(field).replace("%", "%%")
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help}
        if isinstance(field.default, bool):
            parser.add_argument(*names, action="store_false" if field.default else "store_true", **common)
        elif isinstance(field.default, tuple):
            parser.add_argument(*names, nargs="+", action="extend", metavar=spec.metavar, **common)
        else:
            parser.add_argument(*names, metavar=spec.metavar or field.name.upper().replace("_", "-"), **common)


def from_kwargs(cls: type[T], given: Mapping[str, Any]) -> T:
    """An instance from keyword arguments or from what `add_arguments` parsed; None means the default.

    Raises QkitError for a name that is no option and for a value that is none of the option's."""
    fields = {field.name: field for field in _fields(cls)}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = (f"did you mean {near[0]!r}? " if near else "") + "the options are " + ", ".join(fields)
            raise QkitError(f"there is no option {name!r}", hint)
    values = {n: _spec(fields[n]).parse(v, flag_name(fields[n])) for n, v in given.items() if v is not None}
    return cls(**values)


def identity(options: Any) -> dict[str, Any]:
    """The options that decide the bytes of the result, as JSON holds them."""
    chosen = {f.name: getattr(options, f.name) for f in _fields(type(options)) if _spec(f).identity}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def command_line(options: Any) -> list[str]:
    """The words that give these options on the command line, without those at their defaults."""
    words: list[str] = []
    for field in _fields(type(options)):
        value = getattr(options, field.name)
        if value == field.default or not _spec(field).command_line:
            continue
        words.append(flag_name(field))
        if not isinstance(value, bool):
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return words


def with_options(cls: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a function whose last parameter is `options`, an instance of `cls`: callers give its fields as keyword
    arguments, and see them in the signature and the documentation."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> T:
            direct = {name: given.pop(name) for name in positional if name in given}
            return function(*args, **direct, options=from_kwargs(cls, given))

        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.name != "options"]
        positional = [p.name for p in kept]
        hints = get_type_hints(cls)
        keyword = inspect.Parameter.KEYWORD_ONLY
        made = [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in _fields(cls)]
        call.__signature__ = signature.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
        width = max(len(f.name) for f in _fields(cls))
        listed = "\n".join(f"    {f.name:<{width}}  {_described(f)}" for f in _fields(cls))
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{listed}\n"
        return call

    return decorate


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if _KEY in f.metadata]


def _spec(field: dataclasses.Field[Any]) -> _Spec:
    spec: _Spec = field.metadata[_KEY]
    return spec


def _described(field: dataclasses.Field[Any]) -> str:
    """The option's help with its default."""
    if field.default is None or isinstance(field.default, bool) or field.default == ():
        return _spec(field).help
    default = field.default if not isinstance(field.default, tuple) else " ".join(map(str, field.default))
    return f"{_spec(field).help} (default {default})"
