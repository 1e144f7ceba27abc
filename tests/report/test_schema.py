"""schema.json: what is written holds, what is damaged does not, and both checkers of it agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import reports
from models import make_model

from qkit import convert
from qkit.estimate.document import SCHEMA_VERSION as PREDICTED_VERSION
from qkit.measure import profile, speed
from qkit.measure.endpoint.types import SCHEMA_VERSION as SERVED_VERSION
from qkit.measure.types import SCHEMA_VERSION as MEASURED_VERSION
from qkit.report import schema
from qkit.report.write import to_json

DOCUMENT = schema.schema()
VALIDATOR = jsonschema.Draft202012Validator(DOCUMENT)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, Any]:
    made = reports.predictions(tmp_path_factory.mktemp("predictions"))
    found = {name: json.loads(to_json(result)) for name, result in reports.measurements().items()}
    found["served"] = json.loads(json.dumps(reports.served().as_dict()))
    return {**found, **{name: json.loads(json.dumps(result.as_dict())) for name, result in made.items()}}


def test_it_is_a_schema_and_knows_the_versions():
    VALIDATOR.check_schema(DOCUMENT)
    assert schema.version() == MEASURED_VERSION == PREDICTED_VERSION == SERVED_VERSION


KINDS = ("alone", "pair", "beside", "several", "swept", "served", "one", "four", "all", "two")


@pytest.mark.parametrize("kind", KINDS)
def test_every_report_holds(documents, kind):
    assert [f"{e.json_path}: {e.message}" for e in VALIDATOR.iter_errors(documents[kind])] == []
    assert schema.problems(documents[kind]) == []


def test_a_real_measurement_holds(tmp_path, monkeypatch):
    """As it runs, with a baseline, in a process of its own, in an engine's sweep."""
    for module, name, value in ((speed, "GENERATED", 4), (speed, "REPEATS", 1), (speed, "_CEILING_BYTES", 1 << 20)):
        monkeypatch.setattr(module, name, value)
    base = make_model(tmp_path / "base", max_position_embeddings=128)
    convert(str(base), str(tmp_path / "w4"), method="rtn", group_size=32)
    result = profile(
        str(tmp_path / "w4"),
        baseline=str(base),
        device="cpu",
        context=16,
        chunks=2,
        out=str(tmp_path / "r"),
        engine="qkit",
        sweep=(16,),
    )
    document = json.loads((tmp_path / "r" / "profile.json").read_text())
    assert [
        f"{e.json_path}: {e.message}"
        for e in jsonschema.Draft202012Validator(
            DOCUMENT["$defs"]["measured"] | {"$defs": DOCUMENT["$defs"]}
        ).iter_errors(document)
    ] == []
    assert schema.problems(document) == [] and document["sweeps"] and result.models[0].active_parameters
    assert VALIDATOR.is_valid(document)
    assert "<h2>Roofline</h2>" in (tmp_path / "r" / "profile.html").read_text()


def parts(value: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from parts(each, (*at, key))


def damaged(document: Any, at: tuple, how: str) -> Any:
    made = copy.deepcopy(document)
    place = made
    for key in at[:-1]:
        place = place[key]
    if how == "removed":
        del place[at[-1]]
    elif how == "another type":
        place[at[-1]] = {"an": "object"} if not isinstance(place[at[-1]], dict) else "a text"
    elif isinstance(place[at[-1]], dict):
        place[at[-1]]["unheard of"] = 1
    return made


OPEN = {"conversion", "settings"}  # objects whose fields are others' to choose


@pytest.mark.parametrize("kind", ["beside", "swept", "served", "one"])
def test_whatever_is_damaged_is_found_by_both(documents, kind):
    """Every field in turn: removed, of another type, and with a neighbour that nobody knows."""
    document, checked = documents[kind], 0
    for at in parts(document):
        if not at or at[0] in ("kind", "formulas") or OPEN & set(at[:-1]):
            continue
        free = isinstance(at[-1], int) or OPEN & set(at)
        for how in ("removed", "another type", "with more"):
            made = damaged(document, at, how)
            if made == document or (how == "removed" and free) or (how == "with more" and at[-1] in OPEN):
                continue
            theirs, ours = not VALIDATOR.is_valid(made), bool(schema.problems(made))
            assert theirs == ours, (at, how)
            # Names that are data (parts, types, percentiles) may be any, of optional fields none is missed.
            if not ours:
                assert how in ("removed", "with more") and named_by_data(at), (at, how)
            checked += ours
    assert checked > 120


DATA = {"parts", "basis", "weights_by_class", "stored_types", "schemes", "kernels", "kld_percentiles", "thresholds",
        "delta_p_percentiles", "protocols", "predicted", "sources"}  # fmt: skip
OPTIONAL = {"predicted", "active_parameters"}


def named_by_data(at: tuple) -> bool:
    return bool(DATA & set(at)) or at[-1] in OPTIONAL


def described(part: Any, at: str = "") -> Iterator[str]:
    """Fields without a phrase that says what they are."""
    for name, each in part.get("properties", {}).items():
        target = DOCUMENT["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else {}
        if not (each.get("description") or target.get("description")):
            yield f"{at}.{name}"
        yield from described(each, f"{at}.{name}")
    if isinstance(part.get("items"), dict):
        yield from described(part["items"], f"{at}[]")


def test_every_field_is_described_and_no_object_is_open_by_accident():
    assert [path for name, part in DOCUMENT["$defs"].items() for path in described(part, name)] == []
    closed = json.dumps(DOCUMENT)
    objects = closed.count('"object"') - sum(closed.count(f'"{name}": {{"description"') for name in OPEN)
    assert closed.count('"additionalProperties"') == objects


def test_nothing_is_described_that_no_report_has(documents):
    """A schema that lists fields which nothing writes would not notice a renamed one."""
    written: dict[str, set[str]] = {}
    for document in documents.values():
        collect(document, DOCUMENT["$defs"][document["kind"]], document["kind"], written)
    missing = {
        f"{name}.{field}"
        for name, part in DOCUMENT["$defs"].items()
        for field in part.get("properties", {})
        if name in written and field not in written[name]
    }
    assert missing == set()
    assert set(DOCUMENT["$defs"]) - set(written) <= {"numbers", "formulas", "failures", "thresholds", "catalogued"}


def collect(value: Any, part: dict[str, Any], name: str, written: dict[str, set[str]]) -> None:
    for branch in part.get("anyOf", []):
        if value is not None:
            collect(value, branch, name, written)
            return
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        part = DOCUMENT["$defs"][name]
    if isinstance(value, dict):
        written.setdefault(name, set()).update(value)
        for key, each in value.items():
            inner = part.get("properties", {}).get(key) or part.get("additionalProperties")
            if isinstance(inner, dict):
                collect(each, inner, f"{name}.{key}", written)
    elif isinstance(value, list) and "items" in part:
        for each in value:
            collect(each, part["items"], f"{name}[]", written)
