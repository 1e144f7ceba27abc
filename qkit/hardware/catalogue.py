"""The catalogue of devices, profiles/hardware, and what a name means in it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from ..errors import QkitError
from . import names
from .cards import FOLDER, profile_path, read_all, read_card
from .device import GIB, Device, Price, Target

__all__ = ["GIB", "Device", "Price", "Target", "catalogue", "find", "match", "parse", "profile_path"]

MOST = 64  # devices of one kind that a target may have
_NEAR = 0.1  # the memory that a name states, or a driver reports, is that of a device where it differs by less


@cache
def catalogue() -> tuple[Device, ...]:
    """The devices of profiles/hardware. Raises QkitError where an entry is malformed."""
    return read_all(profile_path(FOLDER))


def parse(spec: str | Sequence[str]) -> tuple[Target, ...]:
    """What --device means where the device need not be here: an id or another name, with ":2" for two of them; a JSON
    file that describes a card; "all"; or several of these.

    Raises QkitError: an unknown name (with the closest), a card that is none, a count that is not 1 to 64.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    return tuple(dict.fromkeys(target for one in specs for target in _targets(one.strip())))


def _targets(spec: str) -> Iterable[Target]:
    if spec.lower() == "all":
        return [Target(device) for device in catalogue()]
    counted = re.fullmatch(r"(.+):(-?\d+)", spec)
    name, count = (counted[1], int(counted[2])) if counted else (spec, 1)
    if not 1 <= count <= MOST:
        raise QkitError(f"--device {spec}: the number of devices must be 1 to {MOST}, is {count}")
    return [Target(read_card(Path(name).expanduser()) if _is_path(name) else find(name), count)]


def _is_path(name: str) -> bool:
    looks = name.lower().endswith(".json") or name.startswith((".", "~", os.sep))
    return looks or (any(s in name for s in ("/", os.sep)) and Path(name).exists())


def find(name: str) -> Device:
    """The device that a name means: its id, its name, or what drivers, clouds and benchmarks call it. Case, spaces, the
    vendor, numbers of threads and remarks in parentheses do not matter. Memory that is stated must be the device's; of
    what is sold with several sizes ("M3 Max 40c 64GB") and of CPUs ("EPYC 9654 768GB") it chooses the size.

    Raises QkitError with the closest names where there is none, and where there are several.
    """
    for device in catalogue():
        if device.id == name.strip().lower():
            return device
    asked = names.read(name)
    meant = _named(asked)
    if not meant:
        raise QkitError(f"unknown device {name!r}", _closest(name, asked))
    fits = [(device, sized) for device in meant if (sized := _sized(device, asked.gib))]
    if not fits:
        sizes = ", ".join(sorted({_sizes(device) for device in meant}))
        raise QkitError(
            f"{meant[0].name} has {sizes}, not {asked.gib:g} GB",
            "a card with other memory can be described in a JSON file: --device my-card.json",
        )
    if len(fits) > 1:
        raise QkitError(f"{name!r} can be {', '.join(d.id for d, _ in fits)}", "say which of them")
    return fits[0][1]


def match(name: str, memory_bytes: int | None, capability: str | None) -> str | None:
    """The id of the device that a driver calls `name`, nearest in memory where it has several; None where none is so
    called, or where its memory or capability are not the reported ones."""
    fits = []
    for device in _called(names.read(name)):
        if capability and device.capability not in ("", capability):
            continue
        sizes = [s for s in (device.usable_gib, device.memory_gib, *device.memory_options_gib) if s]
        off = 0.0
        if memory_bytes is not None:
            off = min((abs(memory_bytes / GIB / size - 1) for size in sizes), default=1.0)
        if off < _NEAR:
            fits.append((off, device.id))
    return min(fits)[1] if fits else None


@cache
def _index() -> dict[str, tuple[tuple[Device, str, bool], ...]]:
    """Key -> (device, name, whether the name states no memory) of every name of every device."""
    found: dict[str, list[tuple[Device, names.Name]]] = {}
    for device in catalogue():
        for text in dict.fromkeys([device.id, device.name, *device.aliases]):
            name = names.read(text)
            found.setdefault(name.key + name.cores, []).append((device, name))
    return {key: tuple(entries) for key, entries in found.items()}


def _entries(asked: names.Name) -> tuple[tuple[Device, names.Name], ...]:
    """With the cores that a name states, or without: of a CPU they say nothing that its model does not."""
    return _index().get(asked.key + asked.cores) or _index().get(asked.key, ())


def _called(asked: names.Name) -> list[Device]:
    """Every device with a name of this key."""
    return list(dict.fromkeys(device for device, _ in _entries(asked)))


def _named(asked: names.Name) -> list[Device]:
    """Those that a name can mean: with the same memory stated; else those whose name states none; else any."""
    entries = _entries(asked)
    for wanted in (asked.gib, None):
        exact = list(dict.fromkeys(device for device, name in entries if name.gib == wanted))
        if exact and (wanted is not None or asked.gib is None or any(_sized(d, asked.gib) for d in exact)):
            return exact
    return _called(asked)


def _sized(device: Device, gib: float | None) -> Device | None:
    """The device with this much memory; None where it is not to be had so."""
    if gib is None or any(names.read(a).gib == gib for a in (device.id, device.name, *device.aliases)):
        return device
    if gib in device.memory_options_gib or (device.kind == "cpu" and device.memory_gib is None):
        return device if gib == device.memory_gib else device.with_memory(gib)
    return device if device.memory_gib and abs(gib / device.memory_gib - 1) < _NEAR else None


def _sizes(device: Device) -> str:
    return " or ".join(f"{g:g}" for g in device.memory_options_gib or (device.memory_gib or 0,)) + " GB"


def _closest(name: str, asked: names.Name) -> str:
    keys = {key: entries[0][0].id for key, entries in _index().items()}
    near = difflib.get_close_matches(asked.key + asked.cores, keys, 5, 0.55)
    near_ids = difflib.get_close_matches(name.strip().lower(), [d.id for d in catalogue()], 3, 0.5)
    ids = list(dict.fromkeys([*(keys[key] for key in near), *near_ids]))[:4]
    closest = f"the closest are {', '.join(ids)}; " if ids else ""
    return closest + "`qkit devices` lists all, and a JSON file can describe any other: --device my-card.json"
