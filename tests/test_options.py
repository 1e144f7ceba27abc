"""One definition of an option makes the command line, the keyword arguments, the help and the identity."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest

from qkit import options
from qkit.conversion.options import Options as ConvertOptions
from qkit.errors import QkitError
from qkit.measure.options import Options as ProfileOptions


@dataclass(frozen=True)
class Some:
    words: tuple[str, ...] = options.option((), "which words", metavar="WORD", identity=True)
    length: int = options.option(8, "how long (100 % of it)", parse=options.whole(2), identity=True)
    memory: int | None = options.option(None, "how much", parse=options.size)
    checked: bool = options.option(True, "check it")
    fast: bool = options.option(False, "hurry")
    place: str | None = options.option(None, "where", short="-p")
    hidden: int = options.option(1, "for tests", parse=options.whole(0), command_line=False)


@options.with_options(Some)
def act(source: str, options: Some) -> tuple[str, Some]:
    """Do something."""
    return source, options


def parse(cls, *argv):
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_arguments(parser, cls)
    return options.from_kwargs(cls, vars(parser.parse_args(argv)))


@pytest.mark.parametrize("cls", [Some, ConvertOptions, ProfileOptions])
def test_an_empty_command_line_gives_the_defaults(cls):
    assert parse(cls) == cls() == options.from_kwargs(cls, {})


def test_command_line_and_keywords_agree():
    argv = [
        "--words",
        "a",
        "b",
        "--words",
        "c",
        "--length",
        "9",
        "--memory",
        "2KiB",
        "--no-checked",
        "--fast",
        "-p",
        "x",
    ]
    given = {"words": ["a", "b", "c"], "length": 9, "memory": 2048, "checked": False, "fast": True, "place": Path("x")}
    assert parse(Some, *argv) == act("s", **given)[1] == Some(("a", "b", "c"), 9, 2048, False, True, "x")
    assert act(source="s", words="a")[1].words == ("a",)


def test_command_line_repeats_the_options():
    for some in (Some(), Some(("a", "b"), 9, 2048, False, True, "x")):
        assert parse(Some, *options.command_line(some)) == some


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lenght": 3}, "no option 'lenght'"),
        ({"length": "many"}, "--length: 'many' is not a whole number"),
        ({"length": 1}, "--length must be at least 2"),
        ({"length": True}, "whole number"),
        ({"length": 2.5}, "whole number"),
        ({"memory": "plenty"}, "--memory: 'plenty' is not a size"),
        ({"memory": 0}, "--memory"),
        ({"memory": "0GiB"}, "--memory"),
        ({"memory": "9" * 400 + "GiB"}, "--memory must be at most"),
        ({"length": "9" * 400}, "--length must be at most"),
        ({"length": "9" * 9999}, "--length: .* is not a whole number"),
        ({"fast": "yes"}, "--fast must be True or False"),
        ({"place": 3}, "--place must be text"),
        ({"place": ""}, "--place must be text"),
        ({"words": [3]}, "--words must be text"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(QkitError, match=message):
        act("s", **given)


def test_an_unknown_name_hints_at_the_nearest():
    with pytest.raises(QkitError) as caught:
        act("s", lenght=3)
    assert "did you mean 'length'?" in caught.value.hint and "memory" in caught.value.hint


def test_signature_documentation_and_help():
    shown = inspect.signature(act)
    assert list(shown.parameters) == ["source", *Some.__dataclass_fields__]
    assert shown.parameters["length"].default == 8 and shown.parameters["memory"].annotation == int | None
    assert "how long (100 % of it) (default 8)" in act.__doc__ and act.__doc__.startswith("Do something.")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Some)
    text = parser.format_help()
    assert "do not check it" in text and "(100 % of it) (default 8)" in text and "hidden" not in text


def test_identity_is_what_decides_the_bytes():
    assert options.identity(Some(("a",), memory=5)) == {"words": ["a"], "length": 8}


@pytest.mark.parametrize(
    ("value", "expected"), [("channel", 0), (-1, 0), ("-1", 0), (0, 0), ("64", 64), (128, 128), (None, None)]
)
def test_group_size(value, expected):
    assert options.from_kwargs(ConvertOptions, {"group_size": value}).group_size == expected


@pytest.mark.parametrize("value", ["many", -2, "1.5", True, 64.0])
def test_bad_group_sizes(value):
    with pytest.raises(QkitError, match=r"--group-size.*is not a group size"):
        options.from_kwargs(ConvertOptions, {"group_size": value})


@pytest.mark.parametrize("bad", [{"max_kld": -1}, {"min_tps": "nan"}, {"max_kld": "x"}, {"batch": [0]}, {"context": 7}])
def test_bad_options_of_a_profile(bad):
    with pytest.raises(QkitError, match="--" + next(iter(bad)).replace("_", "-")):
        options.from_kwargs(ProfileOptions, bad)
