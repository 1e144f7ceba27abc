"""The figures by which two documents of `qkit profile` are compared, of each kind, and what they were found with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
Value = tuple[float | None, float | None]  # with its standard error, None where it is exact or its error unknown

KLD, MEMORY = "mean KL divergence", "memory"
RATES = {"measured": "generate", "predicted": "decode", "endpoint": "output"}  # what a slowdown is of


@dataclass(frozen=True)
class Figure:
    """of(document, row) -> its value. needs: parts of the setting that have to be the same."""

    name: str
    unit: str
    needs: tuple[str, ...]
    of: Callable[[Document, Document], Value]


def short(name: str) -> str:
    path = Path(name.rstrip("/"))
    return (path.parent if path.name == "config.json" else path).name or name


def rows(document: Document) -> dict[str, Document]:
    """Name -> what is compared under it: a model that was measured, one on a device, or a server's concurrency."""
    if document["kind"] == "endpoint":
        return {
            f"concurrency {level['concurrency']}": {
                **level,
                "name": f"{document['model']}, {level['concurrency']} at once",
            }
            for level in document["levels"]
        }
    if document["kind"] == "measured":
        return {short(model["name"]): model for model in document["models"]}
    return {
        f"{short(each['model']['name'])} on {answer['device']}": {
            **answer,
            "of": each,
            "name": f"{each['model']['name']} on {answer['device']}",
        }
        for each in document["estimates"]
        for answer in each["answers"]
    }


def _estimate(name: str, against: bool = True) -> Callable[[Document, Document], Value]:
    def of(document: Document, model: Document) -> Value:
        quality = model["quality"]
        found = quality["protocols"].get(document["provenance"]["headline_protocol"]) if quality else None
        if found is not None and against:
            found = found["against"]
        return (None, None) if found is None else (found[name]["value"], found[name]["error"])

    return of


def _speed(name: str) -> Callable[[Document, Document], Value]:
    return lambda document, model: (model["speed"][0][name] if model["speed"] else None, None)


def _of(*path: str) -> Callable[[Document, Document], Value]:
    """A field of a row, or of what stands in one; None where one on the way is null."""

    def of(document: Document, row: Document) -> Value:
        found: Any = row
        for name in path:
            found = None if found is None else found[name]
        return found, None

    return of


def _succeeded(name: str) -> Callable[[Document, Document], Value]:
    return lambda document, level: (level[name] if level["succeeded"] else None, None)


def _failed(document: Document, level: Document) -> Value:
    return 1 - level["succeeded"] / level["requests"], None


def _first(document: Document, answer: Document) -> Value:
    """The time to the first token of a prompt as long as the context."""
    found = [f for f in (answer["speed"] or {"first": []})["first"] if f["prompt"] == answer["of"]["context"]]
    return (found[0]["seconds"] if found else None), None


_LOAD = ("concurrency", "context", "new tokens")
_TEXT, _RUN, _ASKED = ("text", "protocol"), ("device", "prompt", "batch"), ("context", "batch", "engine")
FIGURES: dict[str, tuple[Figure, ...]] = {
    "measured": (
        Figure("size on disk", "bytes", (), _of("stored_bytes")),
        Figure("bits per weight", "", (), _of("bits_per_weight")),
        Figure(KLD, "", (*_TEXT, "baseline"), _estimate("kld")),
        Figure("top-1 agreement", "share", (*_TEXT, "baseline"), _estimate("same_top")),
        Figure("perplexity", "", _TEXT, _estimate("perplexity", against=False)),
        Figure(RATES["measured"], "tokens/s", _RUN, _speed("generate_tps")),
        Figure("time to first token", "seconds", _RUN, _speed("ttft_median")),
        Figure(MEMORY, "bytes", ("device", "context"), _of("memory", "total")),
    ),
    "predicted": (
        Figure("weights", "bytes", (), _of("of", "model", "weights")),
        Figure(MEMORY, "bytes", _ASKED, _of("memory", "total")),
        Figure("largest context", "tokens", ("batch", "engine"), _of("largest_context")),
        Figure("largest batch", "", ("context", "engine"), _of("largest_batch")),
        Figure(RATES["predicted"], "tokens/s", _ASKED, _of("speed", "decode", "tokens_per_s")),
        Figure("time to first token", "seconds", _ASKED, _first),
        Figure("a million new tokens", "dollars", _ASKED, _of("costs", "per_million_out")),
    ),
    "endpoint": (
        Figure(RATES["endpoint"], "tokens/s", _LOAD, _succeeded("output_tps")),
        Figure("requests a second", "", _LOAD, _succeeded("requests_per_s")),
        Figure("time to first token, p50", "seconds", _LOAD, _of("ttft", "p50")),
        Figure("time to first token, p99", "seconds", _LOAD, _of("ttft", "p99")),
        Figure("time per output token, p50", "seconds", _LOAD, _of("tpot", "p50")),
        Figure("time per output token, p99", "seconds", _LOAD, _of("tpot", "p99")),
        Figure("failed requests", "share", _LOAD, _failed),
    ),
}


def setting(document: Document, row: Document) -> dict[str, Any]:
    """What figures were found with: they compare only where it is the same."""
    if document["kind"] == "endpoint":
        asked = {"context": document["context"], "new tokens": document["max_tokens"]}
        return {**asked, "concurrency": row["concurrency"]}
    if document["kind"] == "predicted":
        return {"context": row["of"]["context"], "batch": row["of"]["batch"], "engine": row["engine"]}
    text, device, memory = document["text"], document["device"], row["memory"]
    first = row["speed"][0] if row["speed"] else {"batch": None, "prompt": None}
    baseline = document["baseline"]
    return {
        "text": (text["sha256"], text["chunks"], text["n_ctx"], text["bos"]),
        "protocol": document["provenance"]["headline_protocol"],
        "baseline": baseline["fingerprint"] if baseline else None,
        "device": (device["name"], device["threads"]),
        "context": (memory["tokens"], memory["batch"]),
        "prompt": first["prompt"],
        "batch": first["batch"],
    }
