"""The command line: one command = one public function, same names, same defaults. Data goes to stdout, the rest
to stderr. Exit codes: 0 done, 1 a threshold was missed or verification failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import QkitError

SOURCE_HELP = "a folder of safetensors, a .gguf file, a Hub id, or 'demo' (the embedded default model)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QkitError(message, f"{self.prog} --help lists the options")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qkit", description="Make a model fit with one command, prove what it cost with one report.")
    parser.add_argument("--version", action="version", version=f"qkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.required = True
    _convert(commands)
    _profile(commands)
    _inspect(commands)
    _devices(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _convert(commands: Any) -> None:
    p = _command(commands, "convert", run_convert, "quantize a checkpoint into a new folder")
    p.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    p.add_argument("-o", "--out", required=True, help="folder to create; it appears complete, as the last step")
    formats = "compressed-tensors (default), gptq, gptq_v2 or safetensors (export)"
    p.add_argument("--format", default="compressed-tensors", help=formats)
    p.add_argument("--scheme", default="w4a16", help="w4a16 (default), w4a16-asym, w8a16, w8a16-asym or none")
    p.add_argument("--method", help="rtn or gptq; default: gptq below 8 bits, rtn at 8")
    groups = "input channels per scale, or 'channel'; default: the largest of 128, 64, 32 that fits"
    p.add_argument("--group-size", metavar="N", help=groups)
    p.add_argument("--clip-search", action="store_true", help="rtn: search each group's scale for the least error")
    p.add_argument("--calib", metavar="FILE|HUB_ID", help="calibration text; default: text that ships with Python")
    p.add_argument("--calib-samples", type=int, default=64, metavar="N", help="calibration windows (default 64)")
    p.add_argument("--calib-len", type=int, default=512, metavar="N", help="tokens per window (default 512)")
    p.add_argument("--device", default="auto", help="where gptq computes: auto (default), cpu, cuda or cuda:i")
    p.add_argument("--max-memory", metavar="SIZE", help="memory to stay within, such as 8GiB")
    p.add_argument("--lora", metavar="DIR", help="PEFT adapter to merge first")
    skip = "leave modules alone, such as '*.down_proj'"
    p.add_argument("--skip", nargs="+", action="extend", default=[], metavar="PATTERN", help=skip)
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--restart", action="store_true", help="discard an interrupted or earlier conversion at OUT")
    p.add_argument("--no-verify", dest="verify", action="store_false", help="do not read the result back")


def _profile(commands: Any) -> None:
    p = _command(commands, "profile", run_profile, "measure memory, speed and quality of a model on this machine")
    p.add_argument("model", metavar="MODEL", help="a converted folder, or " + SOURCE_HELP)
    p.add_argument("--baseline", metavar="SOURCE", help="the model to compare with: KL divergence, top-1 agreement")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:i")
    p.add_argument("--context", type=int, metavar="N", help="tokens of context to measure memory and speed at")
    p.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="batch sizes (default 1)")
    p.add_argument("--text", metavar="FILE", help="evaluation text; default: text that ships with Python")
    p.add_argument("--max-kld", type=float, metavar="X", help="exit with 1 if the mean KL divergence is above X")
    p.add_argument("--min-tps", type=float, metavar="X", help="exit with 1 if decode tokens/s is below X")
    p.add_argument("-o", "--out", metavar="DIR", help="folder for the report (default qkit-profile/MODEL)")


def _inspect(commands: Any) -> None:
    p = _command(commands, "inspect", run_inspect, "show what a checkpoint holds")
    p.add_argument("model", metavar="MODEL", help=SOURCE_HELP)
    p.add_argument("--verify", action="store_true", help="check every hash in the folder's manifest")


def _devices(commands: Any) -> None:
    _command(commands, "devices", run_devices, "list the devices present here and the hardware catalogue")


def run_convert(args: argparse.Namespace) -> int:
    from . import units
    from .conversion import plan as planning
    from .conversion.run import convert, summary
    from .progress import say

    options = _options(args)
    if args.group_size is not None:
        options["group_size"] = planning.group_size_option(args.group_size)
    if args.max_memory is not None:
        options["max_memory"] = units.parse_size(args.max_memory, "--max-memory")
    result = convert(**options)
    if args.json:
        _print_json(result.plan.as_dict() if args.dry_run else result.as_dict())
    elif args.dry_run:
        print(planning.describe(result.plan))
    else:
        for note in result.plan.notes:
            say(note)
        print(summary(result))
    return 0


def run_profile(args: argparse.Namespace) -> int:
    from .measure import profile, summary

    result = profile(**_options(args))
    if args.json:
        _print_json(result.as_dict())
    else:
        print(summary(result))
    return 0 if result.passed else 1


def run_inspect(args: argparse.Namespace) -> int:
    from .inspection import describe, inspect

    result = inspect(**_options(args))
    if args.json:
        _print_json(result.as_dict())
    else:
        print(describe(result))
    return 1 if result.problems else 0


def run_devices(args: argparse.Namespace) -> int:
    from .hardware.devices import describe, devices

    result = devices()
    if args.json:
        _print_json(result.as_dict())
    else:
        print(describe(result))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k not in ("command", "run", "json")}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed: tensors come and go by the thousand, and a fresh page costs more than the
    arithmetic on it (GPTQ of a small model: 30 % less processor time). Only here: in a library call the process is
    not ours to tune. glibc alone has the call; elsewhere nothing changes."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Every expected failure becomes `error:` and `hint:` lines."""
    interrupt = signal.default_int_handler
    try:
        signal.signal(signal.SIGTERM, interrupt)  # a terminated run cleans up just as an interrupted one does
        args = build_parser().parse_args(argv)
        _keep_freed_memory()
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except QkitError as e:
        print(f"error: {e.message}", file=sys.stderr)
        if e.hint:
            print(f"hint: {e.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # What follows is only shutdown: another Ctrl-C there must not print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\ninterrupted; nothing is lost: the same command continues where this one stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has left
        return 0
    except MemoryError:
        print("error: out of memory\nhint: lower --max-memory, --calib-samples or --context", file=sys.stderr)
        return 2
