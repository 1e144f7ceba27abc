"""Files of devices: those of profiles/hardware, and a card that a user describes."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import QkitError
from ..storage.local import read_small
from ..untrusted import parse_json
from .device import FIGURES, Device, Price, usable, usable_rule
from .schema import problems

FOLDER = "hardware"
SCHEMA = "schema.json"
_MOST_BYTES = 4 << 20


def profile_path(name: str) -> Path:
    """Where a file or folder of profiles/ lies: in the installed package, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "profiles" / name
    return installed if installed.exists() else here.parent / "profiles" / name


def read_all(folder: Path) -> tuple[Device, ...]:
    """The devices of every file of a folder, in the order of the files' names and of their entries.

    Raises QkitError, naming file, entry and field, where something is not as the folder's schema.json has it.
    """
    schema = _parse(folder / SCHEMA)
    paths = sorted(path for path in folder.glob("*.json") if path.name != SCHEMA)
    if not paths:
        raise QkitError(f"there is no device in {folder}", "reinstall qkit")
    found: list[Device] = []
    for path in paths:
        document = _parse(path)
        wrong = problems(document, schema, schema)
        if wrong:
            raise QkitError(f"{path.name}: {_named(wrong[0], document)}")
        found += (_device(entry, document["sources"], path.name) for entry in document["devices"])
    twice = sorted(id for id, times in Counter(device.id for device in found).items() if times > 1)
    if twice:
        raise QkitError(f"{folder}: {', '.join(twice)} stands there twice")
    return tuple(found)


def read_card(path: Path) -> Device:
    """A device that a user describes in a JSON file: name, memory_gib, bandwidth_gbs, any other field of the schema.

    Raises QkitError naming the file and the field.
    """
    schema = _card_schema()
    card = _parse(path, of_the_user=True)
    wrong = problems(card, schema["$defs"]["card"], schema)
    if wrong:
        others = len({problem.partition(": ")[0] for problem in wrong}) - 1
        more = f" (and {others} more)" if others else ""
        raise QkitError(f"{path}: {wrong[0]}{more}", "a card needs name, memory_gib and bandwidth_gbs; " + _HOW)
    known = {"id": _slug(card["name"]), "kind": "gpu", "vendor": "", "arch": "", "aliases": [], **card}
    if card.get("usable_gib") is None:
        known["usable_gib"] = usable(known["vendor"], known["kind"], card["memory_gib"])
        text = f"derived: {usable_rule(known['vendor'], known['kind'])} of memory_gib"
        known["sources"] = {"usable_gib": text, **card.get("sources", {})}
    elif card["usable_gib"] > card["memory_gib"]:
        raise QkitError(f"{path}: usable_gib: {card['usable_gib']:g} is more than memory_gib, {card['memory_gib']:g}")
    known["sources"] = {"*": f"given in {path.name}", **known.get("sources", {})}
    return _device(known, {}, path.name)


_HOW = "other fields: schema.json, beside the catalogue's files, says what each means"


@cache
def _card_schema() -> Any:
    return _parse(profile_path(FOLDER) / SCHEMA)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-.+") or "card"


def _parse(path: Path, of_the_user: bool = False) -> Any:
    hint = "a card is a JSON file; `qkit devices` lists the known devices" if of_the_user else "reinstall qkit"
    if not path.exists():
        raise QkitError(f"there is no file {path}", hint)
    try:
        return parse_json(read_small(path, _MOST_BYTES), parse_constant=_no_constant)
    except QkitError as error:
        raise QkitError(error.message, hint) from None
    except ValueError as error:  # not UTF-8, not JSON, NaN, nested without end
        raise QkitError(f"{path} is not a JSON file: {error}", hint) from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _named(problem: str, document: Any) -> str:
    """The problem with the entry's id in place of its index, where it has one."""
    found = re.match(r"devices\[(\d+)\](?:\.|: )", problem)
    if not found:
        return problem
    entry = document["devices"][int(found[1])]
    name = entry.get("id") if isinstance(entry, dict) else None
    return f"{name if isinstance(name, str) else found[0].rstrip('.: ')}: {problem[found.end() :]}"


def _device(entry: dict[str, Any], texts: dict[str, str], file: str) -> Device:
    """An entry that the schema has accepted. Raises QkitError where a figure has no source."""
    given = entry.get("sources", {})
    sources = {}
    for name in FIGURES:
        if entry.get(name) is not None:
            source = given.get(name, given.get("*"))
            if source is None:
                raise QkitError(f"{file}: {entry['id']}: {name}: has no source")
            sources[name] = texts.get(source, source)
    for i, price in enumerate(entry.get("prices", ())):
        amount, other = ("usd_per_hour", "usd") if price["what"] == "rent" else ("usd", "usd_per_hour")
        if amount not in price or other in price:
            raise QkitError(f"{file}: {entry['id']}: prices[{i}]: a {price['what']} has {amount}, and not {other}")
    unknown = set(given) - set(FIGURES) - {"*"}
    if unknown:
        raise QkitError(f"{file}: {entry['id']}: sources.{min(unknown)}: is no figure of a device")
    values = {name: value for name, value in entry.items() if name not in ("aliases", "memory_options_gib", "prices")}
    return Device(
        **{
            **values,
            "aliases": tuple(entry["aliases"]),
            "memory_options_gib": tuple(entry.get("memory_options_gib", ())),
            "prices": tuple(Price(**price) for price in entry.get("prices", ())),
            "sources": sources,
        }
    )
