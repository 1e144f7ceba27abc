"""schema.json, which ships beside this file: what a profile.json or endpoint.json holds, and a check of either.

A report is not checked as it is written: what it would find is a fault of qkit's own, for which nobody should lose what
was measured. The tests check documents of every kind, and whoever reads one checks it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from ..hardware.schema import problems as found

KINDS = ("measured", "predicted", "endpoint")


@cache
def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


@cache
def version() -> int:
    """The schema_version that it describes."""
    (only,) = schema()["$defs"]["measured"]["properties"]["schema_version"]["enum"]
    return only


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a document of one of the `KINDS`, each with the path of the field."""
    return found(document, schema()["$defs"][document["kind"]], schema())
