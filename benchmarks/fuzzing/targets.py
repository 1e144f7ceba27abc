"""What is fuzzed: each target opens a case by the functions that users call, and lets errors out as they come."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import seeds
from .mutate import Case

Seeds = Callable[[Path], list[Case]]


@dataclass(frozen=True)
class Target:
    """seeds: cases in order, made below a folder; run: reads a case, and may say what came of it; only: files that are
    mutated, by the end of their names (all where empty); places: pipes, folders and links may lie in their place."""

    seeds: Seeds
    run: Callable[[Path], Any]
    only: tuple[str, ...] = ()
    places: bool = True


def _read_all(source: Any) -> None:
    for name in source.names()[:40]:
        source.meta(name)
        source.read(name)
        for piece in source.slabs(name, 1 << 16) or ():
            piece.numel()
    _ = source.fingerprint, source.metadata, source.stored.describe(), source.base_model


def safetensors(folder: Path) -> None:
    from qkit.storage.safetensors import SafetensorsFile

    file = SafetensorsFile(folder / "model.safetensors")
    for name in file.names()[:40]:
        file.read(name)
        file.sample(name)
    file.close()


def model(folder: Path) -> None:
    from qkit.estimate.subject import of_described
    from qkit.sources import open_source
    from qkit.sources.described import describe_source

    source = open_source(str(folder))
    _read_all(source)
    of_described(describe_source(str(folder)))


def inspected(folder: Path) -> None:
    from qkit.inspection import describe, inspect

    verify = (folder / "qkit_manifest.json").is_file()
    found = inspect(str(folder), verify=verify)
    describe(found)
    json.dumps(found.as_dict(), allow_nan=False)


def expanded(folder: Path) -> None:
    from qkit.formats.expanded import Expanded
    from qkit.sources import open_source
    from qkit.sources.sliced import sliced

    source = open_source(str(folder))
    source = Expanded(sliced(source) or source)
    for name in source.names()[:40]:
        source.meta(name)
        source.read(name)


def loaded(folder: Path) -> None:
    import qkit

    qkit.load(str(folder), device="cpu")


def planned(folder: Path) -> None:
    import qkit

    with redirect_stderr(io.StringIO()):
        for options in ({}, {"format": "gguf"}, {"format": "safetensors", "scheme": "none"}):
            result = qkit.convert(str(folder), folder.parent / "out", dry_run=True, method="rtn", **options)
            json.dumps(result.as_dict(), allow_nan=False)


def gguf(folder: Path) -> None:
    from qkit.estimate.subject import of_described
    from qkit.sources import open_source

    source = open_source(str(folder / "m.gguf"))
    _read_all(source)
    for sidecar in source.sidecars:
        sidecar.sha256()
    of_described(source)


def config(folder: Path) -> None:
    from qkit.estimate.document import document
    from qkit.estimate.estimate import Asked, estimate
    from qkit.estimate.render import describe
    from qkit.hardware.catalogue import parse

    place = folder / "base" if (folder / "base").is_dir() else folder
    card = folder / "card.json"
    targets = parse(
        [str(card), f"{card}:2"] if "card.json" in {p.name for p in folder.iterdir()} else ["h100-sxm", "rtx-4090:2"]
    )
    found = estimate(str(place), targets, Asked())
    describe(found)
    json.dumps(document([found]), allow_nan=False, default=str)


def lora(folder: Path) -> None:
    from qkit.sources import open_source

    _read_all(open_source(str(folder / "base"), lora=str(folder / "adapter")))


def recipe(folder: Path) -> None:
    import qkit

    with redirect_stderr(io.StringIO()):
        qkit.convert(
            str(folder / "base"), folder.parent / "out", dry_run=True, method="rtn", recipe=str(folder / "recipe.yaml")
        )


_tokenizers: dict[str, Any] = {}


def text(folder: Path) -> None:
    from qkit.text.read import read_text
    from qkit.text.tokenizer import load_tokenizer

    name = next((p.name for p in folder.iterdir() if p.name.startswith("t.")), "t.txt")
    if not _tokenizers:
        _tokenizers["one"] = load_tokenizer(str(folder / "base"))
    found = read_text(str(folder / name), _tokenizers["one"])
    _ = found.sha256, found.words(100)


def tokenizer(folder: Path) -> None:
    from qkit.formats.gguf.vocabulary import Vocabulary
    from qkit.sources import open_source
    from qkit.text.read import read_text
    from qkit.text.tokenizer import load_tokenizer

    source = open_source(str(folder))
    chat = folder.parent / "chat.jsonl"
    if not chat.exists():
        chat.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    from qkit.errors import QkitError

    problem = None
    try:
        found = load_tokenizer(source)
        read_text(str(chat), found)
        found("some text")
    except QkitError as error:
        problem = error
    Vocabulary(source).metadata(260)
    if problem:
        raise problem


def compared(folder: Path) -> None:
    from qkit.comparison import compare
    from qkit.report.changes import text as changes

    result = compare(folder / "before.json", folder / "after.json", max_slowdown=5.0)
    changes(result)
    json.dumps(result.as_dict(), allow_nan=False)


def stream(folder: Path) -> str:
    """The reply through a socket, as a server would send it; nothing but an `Outcome` may come of it."""
    import http.client
    import socket
    import statistics

    from qkit.errors import QkitError
    from qkit.measure.endpoint.address import ask
    from qkit.measure.endpoint.request import Ask, prompt_length, send

    content = (folder / "reply.sse").read_bytes() if (folder / "reply.sse").is_file() else b""

    class Place:
        path, url = "/v1", "http://x/v1"

        def connect(self, timeout: float) -> http.client.HTTPConnection:
            here, there = socket.socketpair()
            there.sendall(content[:100_000])
            there.shutdown(socket.SHUT_WR)
            there.settimeout(0.1)
            connection = http.client.HTTPConnection("x", timeout=timeout)
            connection.sock = here
            connection.other = there  # type: ignore[attr-defined]  # kept open
            return connection

        def headers(self) -> dict[str, str]:
            return {}

    said = []
    for route in ("/completions", "/chat/completions"):
        out = send(Place(), Ask(route, "m", 3, {}), "a prompt", 2.0)  # type: ignore[arg-type]
        if out.reason is None:
            statistics.fmean([out.ttft, out.latency, float(out.tokens), float(out.prompt_tokens or 0)])
        out.message.encode("utf-8", "surrogatepass")
        said.append(f"{out.reason} {out.message[:12]} {out.counted} {len(out.arrivals)}")
    prompt_length(Place(), Ask("/completions", "m", 3, {}), "a", 2.0)  # type: ignore[arg-type]
    with suppress(QkitError):
        ask(Place(), "/models", 2.0)  # type: ignore[arg-type]
    return " ".join(said)


def _plain(work: Path) -> list[Case]:
    return [seeds.plain(work)]


def _all_folders(work: Path) -> list[Case]:
    return [seeds.plain(work), *seeds.quantized(work)]


_WEIGHTS = ("config.json", ".safetensors")
TARGETS: dict[str, Target] = {
    "safetensors": Target(seeds.files, safetensors),
    "model": Target(_plain, model),
    "inspect": Target(_all_folders, inspected, (*_WEIGHTS, "manifest.json", "index.json", "quantize_config.json")),
    "expanded": Target(seeds.quantized, expanded, _WEIGHTS),
    "load": Target(_all_folders, loaded, (*_WEIGHTS, "generation_config.json")),
    "plan": Target(_all_folders, planned, (*_WEIGHTS, "index.json", "tokenizer.json")),
    "gguf": Target(seeds.ggufs, gguf),
    "config": Target(seeds.configs, config),
    "lora": Target(seeds.adapters, lora, ("adapter_config.json", "adapter_model.safetensors")),
    "recipe": Target(seeds.recipes, recipe, (".yaml",)),
    "text": Target(seeds.texts, text, (".jsonl", ".txt", ".gz", ".parquet"), places=False),
    "tokenizer": Target(_plain, tokenizer, ("tokenizer.json", "tokenizer_config.json", ".jinja")),
    "card": Target(seeds.cards, config, ("card.json",)),
    "compare": Target(seeds.reports, compared),
    "stream": Target(seeds.streams, stream),
}  # fmt: skip
