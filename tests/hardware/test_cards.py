"""Files of devices: the catalogue's, against the schema that ships, and cards of users."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.hardware import cards
from qkit.hardware.catalogue import parse, profile_path
from qkit.hardware.schema import problems

FOLDER = profile_path("hardware")
SCHEMA = json.loads((FOLDER / "schema.json").read_text())
FILES = sorted(path for path in FOLDER.glob("*.json") if path.name != "schema.json")
CARD = {"name": "My Card 9000", "memory_gib": 40, "bandwidth_gbs": 1000.5}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_are_as_the_schema_has_them(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_files_sources_are_all_used(path):
    document = json.loads(path.read_text())
    used = {source for device in document["devices"] for source in device["sources"].values()}
    assert set(document["sources"]) <= used


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(-10, 1e5) | st.text(max_size=4)
    | st.sampled_from(["gpu", "unified", "rent", "2026-01", "2026-13-41", "h100", "é b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["usd", "what", "*"]), inner),
    max_leaves=4,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*SCHEMA["$defs"]["fields"]["properties"], "memory"]), json_values, max_size=4))
def test_our_checks_and_those_of_jsonschema_agree(changed):
    """The check that runs without jsonschema accepts and refuses the same cards."""
    jsonschema = pytest.importorskip("jsonschema")
    card = {**CARD, **changed}
    validator = jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], "$ref": "#/$defs/card"})
    assert (not problems(card, SCHEMA["$defs"]["card"], SCHEMA)) == validator.is_valid(card)


def test_a_keyword_that_our_checks_do_not_know_is_not_passed_over():
    with pytest.raises(KeyError, match="maxItems"):
        problems([], {"maxItems": 1}, {})


def write(tmp_path, content, name="my-card.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_card_needs_three_fields(tmp_path):
    (target,) = parse(f"{write(tmp_path, CARD)}:3")
    device = target.device
    assert (device.id, device.kind, device.memory_gib, device.bandwidth_gbs) == ("my-card-9000", "gpu", 40, 1000.5)
    assert device.usable_gib == 38.8 and target.count == 3 and device.fp16_tflops is None
    assert device.sources == {
        "memory_gib": "given in my-card.json",
        "usable_gib": "derived: 97% of memory_gib",
        "bandwidth_gbs": "given in my-card.json",
    }


def test_a_card_can_say_everything(tmp_path):
    price = {"what": "rent", "usd_per_hour": 1.5, "market": "here", "date": "2026-11", "source": "our invoice"}
    card = {
        **CARD, "id": "mine", "vendor": "NVIDIA", "arch": "Ada", "kind": "gpu", "capability": "8.9", "usable_gib": 39,
        "fp16_tflops": 100, "fp4_tflops": None, "prices": [price], "sources": {"fp16_tflops": "measured"},
    }  # fmt: skip
    (target,) = parse(str(write(tmp_path, card)))
    assert target.spec == "mine" and target.device.compute_capability == (8, 9)
    assert target.device.prices[0].usd_per_hour == 1.5 and target.device.sources["fp16_tflops"] == "measured"


def test_a_card_is_found_beside_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, {**CARD, "vendor": "Apple", "kind": "unified"})
    monkeypatch.chdir(tmp_path)
    assert parse("my-card.json") == parse("./my-card.json") == parse(str(tmp_path / "my-card.json"))
    assert parse("my-card.json")[0].device.usable_gib == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**CARD, "bandwidth_gbs": "fast"}, 'bandwidth_gbs: must be a number, is "fast"'),
        ({**CARD, "memory_gib": -8}, "memory_gib: must be over 0, is -8"),
        ({**CARD, "memory_gib": 0}, "memory_gib: must be over 0, is 0"),
        ({**CARD, "memory_gib": None}, "memory_gib: must be a number, is null"),
        ({**CARD, "memory_gib": True}, "memory_gib: must be a number, is true"),
        ({**CARD, "memory_gib": 1e9}, "memory_gib: must be at most 16384"),
        ({"name": "x", "memory_gib": 8}, "bandwidth_gbs: is missing"),
        ({}, r"name: is missing \(and 2 more\)"),
        ({**CARD, "bandwith_gbs": 3}, "bandwith_gbs: is not a field; bandwidth_gbs is"),
        ({**CARD, "memory": 3}, "memory: is not a field"),
        ({**CARD, "name": ""}, "name: must have 1 or more characters"),
        ({**CARD, "kind": "tpu"}, "kind: must be one of gpu, cpu, unified"),
        ({**CARD, "id": "My Card"}, "id: must match"),
        ({**CARD, "aliases": "x"}, "aliases: must be a list"),
        ({**CARD, "aliases": ["x", 3]}, r"aliases\[1\]: must be a text, is 3"),
        ({**CARD, "usable_gib": 41}, "usable_gib: 41 is more than memory_gib, 40"),
        ({**CARD, "sources": {"speed": "x"}}, "sources.speed: is no figure"),
        ({**CARD, "prices": [{"what": "rent"}]}, r"prices\[0\].market: is missing"),
        (
            {**CARD, "prices": [{"what": "rent", "usd": 5, "market": "m", "date": "2026", "source": "somewhere"}]},
            r"prices\[0\]: a rent has usd_per_hour, and not usd",
        ),
        ([CARD], r"must be an object, is \["),
        ("40", "must be an object, is 40"),
        ("{", "is not a JSON file"),
        ("", "is not a JSON file"),
        ('{"name": "x", "memory_gib": NaN, "bandwidth_gbs": 1}', "NaN is no number of JSON"),
        ('{"name": "x", "memory_gib": 1e999, "bandwidth_gbs": 1}', "memory_gib: must be a number, is Infinity"),
        ("[" * 100_000, "is not a JSON file"),
        ('{"name": "x", "memory_gib": 1' + "0" * 400 + ', "bandwidth_gbs": 1}', "memory_gib: must be a number"),
        ('{"name": "\\ud800", "memory_gib": 1, "bandwidth_gbs": 1}', "is not a JSON file"),
        (" " * (5 << 20), "bytes long"),
    ],
    ids=lambda v: None if not isinstance(v, str) else v[:40],
)
def test_bad_cards_are_refused_by_file_and_field(tmp_path, content, message):
    with pytest.raises(QkitError, match=message) as caught:
        parse(str(write(tmp_path, content)))
    assert "my-card.json" in caught.value.message


def test_what_is_no_card(tmp_path):
    (tmp_path / "cards.json").mkdir()
    (tmp_path / "cards").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("cards.json", "is not a regular file"),
        ("cards", "is not a regular file"),
        ("none.json", "there is no file"),
        ("binary.json", "is not a JSON file"),
    ):
        with pytest.raises(QkitError, match=message):
            parse(str(tmp_path / name))


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FOLDER / "schema.json", tmp_path)
    shutil.copy(FOLDER / "intel.json", tmp_path)
    return tmp_path


def spoiled(folder, change):
    path = folder / "intel.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["devices"][0].update(tdp_w="hot"),
            'intel.json: arc-a770: tdp_w: must be a number or null, is "hot"',
        ),
        (lambda d: d["devices"][0].pop("link"), "intel.json: arc-a770: link: is missing"),
        (lambda d: d["devices"][1].pop("id"), r"intel.json: devices\[1\]: id: is missing"),
        (lambda d: d["devices"][0]["sources"].pop("*"), "intel.json: arc-a770: .*: has no source"),
        (lambda d: d["devices"].append("x"), r"intel.json: devices\[6\]: must be an object"),
        (lambda d: d.pop("sources"), "intel.json: sources: is missing"),
        (lambda d: d.update(devices=[]), "intel.json: devices: must have 1 or more entries"),
        (lambda d: d["devices"].append(d["devices"][0]), "arc-a770 stands there twice"),
    ],
)
def test_a_catalogue_that_is_damaged(folder, change, message):
    assert cards.read_all(folder)[0].id == "arc-a770"
    spoiled(folder, change)
    with pytest.raises(QkitError, match=message):
        cards.read_all(folder)


def test_a_catalogue_that_is_not_there(tmp_path):
    with pytest.raises(QkitError, match=r"no file .*schema.json"):
        cards.read_all(tmp_path)
    shutil.copy(FOLDER / "schema.json", tmp_path)
    with pytest.raises(QkitError, match="there is no device in"):
        cards.read_all(tmp_path)
