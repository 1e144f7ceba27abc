"""The command line: one command = one public function, same names, same defaults. Data goes to stdout, the rest
to stderr. Exit codes: 0 done, 1 a threshold was missed or verification failed, 2 bad input or an internal error, 130
interrupted."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from . import __version__
from .comparison import Options as CompareOptions
from .conversion.options import Options as ConvertOptions
from .errors import QkitError
from .measure.options import Options as ProfileOptions
from .options import add_arguments, option
from .untrusted import printable

SOURCE = (
    "a folder of safetensors, a .gguf file, a Hub id, s3://bucket/prefix, gs://bucket/prefix or hf://org/name (read "
    "where they lie), or 'demo' (the embedded default model)"
)


@dataclass(frozen=True)
class InspectOptions:
    verify: bool = option(False, "check every hash in the folder's manifest")


@dataclass(frozen=True)
class NoOptions:
    pass


@dataclass(frozen=True)
class Input:
    """A positional argument, of the function under the same name; many: one or more of them, in a list, or none where
    it is not required."""

    name: str
    help: str
    many: bool = False
    required: bool = True

    @property
    def metavar(self) -> str:
        return self.name.upper().removesuffix("S" if self.many else "")


@dataclass(frozen=True)
class Command:
    """A command: the function it calls ("module:name"), its options, and what is made of the result.

    text      (module of the function, result) -> what stdout gets
    inputs    the positional arguments
    out       help of a required -o, an argument of the function beside the options
    failed    whether the result makes the exit code 1
    document  what --json prints"""

    name: str
    help: str
    function: str
    text: Callable[[Any, Any], str]
    options: type = NoOptions
    inputs: tuple[Input, ...] = ()
    out: str | None = None
    failed: Callable[[Any], bool] = lambda result: False
    document: Callable[[Any], dict[str, Any]] = lambda result: result.as_dict()


def _conversion_text(module: Any, result: Any) -> str:
    from .conversion.render import describe, summary

    return describe(result.plan) if result.plan.options.dry_run else summary(result)


def _comparison_text(module: Any, result: Any) -> str:
    from .report.changes import text

    return text(result)


COMMANDS = (
    Command(
        "convert",
        "quantize a checkpoint into a new folder",
        "conversion.run:convert",
        _conversion_text,
        ConvertOptions,
        inputs=(Input("source", SOURCE),),
        out="folder to create, or s3://bucket/prefix or gs://bucket/prefix; it appears complete, as the last step",
        document=lambda result: (result.plan if result.plan.options.dry_run else result).as_dict(),
    ),
    Command(
        "profile",
        "measure memory, speed and quality of models on this machine, or predict them on any other",
        "measure:profile",
        lambda module, result: module.summary(result),
        ProfileOptions,
        inputs=(
            Input(
                "models",
                f"a converted folder, or {SOURCE}; several are compared with each other. Where it predicts, a "
                "config.json is enough; with --endpoint it is the name of a model there, or nothing",
                many=True,
                required=False,
            ),
        ),
        failed=lambda result: not result.passed,
    ),
    Command(
        "compare",
        "show what changed between two reports of qkit profile, and hold it against thresholds",
        "comparison:compare",
        _comparison_text,
        CompareOptions,
        inputs=(Input("before", "profile.json of before"), Input("after", "profile.json of after")),
        failed=lambda result: not result.passed,
    ),
    Command(
        "inspect",
        "show what a checkpoint holds",
        "inspection:inspect",
        lambda module, result: module.describe(result),
        InspectOptions,
        inputs=(Input("model", SOURCE),),
        failed=lambda result: bool(result.problems),
    ),
    Command(
        "devices",
        "list the devices present here and the hardware catalogue",
        "hardware.devices:devices",
        lambda module, result: module.describe(result),
    ),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QkitError(message, f"{self.prog} --help lists the options")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qkit", description="Make a model fit with one command, prove what it cost with one report.")
    parser.add_argument("--version", action="version", version=f"qkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser, required=True)
    for command in COMMANDS:
        description = command.help[0].upper() + command.help[1:] + "."
        p = commands.add_parser(command.name, help=command.help, description=description)
        p.set_defaults(command=command)
        for given in command.inputs:
            shape: dict[str, Any] = {"nargs": "+" if given.required else "*"} if given.many else {}
            p.add_argument(given.name, metavar=given.metavar, help=given.help, **shape)
        if command.out:
            p.add_argument("-o", "--out", required=True, metavar="OUT", help=command.out)
        add_arguments(p, command.options)
        p.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Parse, call the command's function, print its result."""
    namespace, unknown = build_parser().parse_known_args(argv)
    given = vars(namespace)
    command, as_json = given.pop("command"), given.pop("json")
    if unknown:
        hint = f"qkit {command.name} --help lists the options"
        raise QkitError(f"qkit {command.name} does not take {' '.join(unknown)}", hint)
    place, _, name = command.function.partition(":")
    module = importlib.import_module(f"{__package__}.{place}")
    result = getattr(module, name)(**given)
    if as_json:
        shown = json.dumps(command.document(result), indent=2, allow_nan=False)
    else:
        shown = "\n".join(map(printable, command.text(module, result).split("\n")))
    print(shown)
    sys.stdout.flush()
    return 1 if command.failed(result) else 0


def _report(error: Exception) -> None:
    """What the user sees of an error that nothing expected: the machine's as it is; a fault of qkit's own as one line,
    and where its traceback lies."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        lines = ["error: out of memory", "hint: lower --max-memory, --calib-samples, --batch or --context"]
    elif isinstance(error, OSError) and error.strerror and error.filename:
        lines = [f"error: {error.filename}: {error.strerror}", "hint: the system refuses this path"]
    else:
        lines = [f"error: internal error: {type(error).__name__}: {error}", f"hint: please report it{_keep(error)}"]
    print("\n".join(map(printable, lines)), file=sys.stderr)


def _keep(error: Exception) -> str:
    """Write the traceback to a file, for a report; says where it is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="qkit-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"qkit {__version__}\n")
            traceback.print_exception(error, file=file)
        return f" with {file.name}"
    except OSError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Every failure becomes `error:` and `hint:` lines."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated run cleans up as an interrupted one
        return run(argv)
    except QkitError as e:
        print(f"error: {printable(e.message)}", file=sys.stderr)
        if e.hint:
            print(f"hint: {printable(e.hint)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # What follows is only shutdown: another Ctrl-C there must not print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\ninterrupted; nothing is lost: the same command continues where this one stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has left
        return 0
    except Exception as error:
        _report(error)
        return 2
