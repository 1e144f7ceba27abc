"""The catalogue of devices, profiles/hardware, and what a name means in it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..errors import QkitError
from . import names
from .cards import FOLDER, profile_path, read_all, read_card
from .device import GIB, Device, Price, Target
from .fast import fast_formats

__all__ = ["GIB", "Device", "Price", "Target", "catalogue", "fast_formats", "find", "match", "parse", "profile_path"]

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


def _targets(spec: str) -> list[Target]:
    counted = re.fullmatch(r"([^:]+|.+\.json):(-?\d+)", spec, re.IGNORECASE)
    name, count = (counted[1].strip(), int(counted[2])) if counted else (spec, 1)
    if not 1 <= count <= MOST:
        raise QkitError(f"--device {spec}: the number of devices must be 1 to {MOST}, is {count}")
    if name.lower() == "all":
        return [Target(device, count) for device in catalogue()]
    if name.endswith(":"):
        raise QkitError(f"unknown device {spec!r}", "two of them are written like h100-sxm:2")
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
    fits = [sized for device in meant if (sized := _sized(device, asked.gib))]
    if not fits:
        sizes = " or ".join(dict.fromkeys(_sizes(device) for device in meant))
        raise QkitError(f"{name!r} is known with {sizes} GB, not with {asked.gib:g}", _OTHER)
    if len(fits) > 1:
        raise QkitError(f"{name!r} can be {', '.join(device.id for device in fits)}", "say which of them")
    return fits[0]


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
def _index() -> dict[str, tuple[tuple[Device, names.Name], ...]]:
    """Key and cores -> (device, name) of every name of every device."""
    found: dict[str, list[tuple[Device, names.Name]]] = {}
    for device in catalogue():
        for name in dict.fromkeys(map(names.read, _names(device))):
            found.setdefault(name.key + name.cores, []).append((device, name))
    return {key: tuple(entries) for key, entries in found.items()}


def _names(device: Device) -> tuple[str, ...]:
    return (device.id, device.name, *device.aliases)


def _entries(asked: names.Name) -> tuple[tuple[Device, names.Name], ...]:
    """With the cores that a name states, or without: of a CPU they say nothing that its model does not."""
    return _index().get(asked.key + asked.cores) or _index().get(asked.key, ())


def _called(asked: names.Name) -> list[Device]:
    """Every device with a name of this key."""
    return list(dict.fromkeys(device for device, _ in _entries(asked)))


def _named(asked: names.Name) -> list[Device]:
    """Those that a name can mean: whose own name states the same memory, else none; else any that is so called."""
    for stated in (asked.gib, None):
        meant = [device for device, name in _entries(asked) if name.gib == stated and _sized(device, asked.gib)]
        if meant:
            return list(dict.fromkeys(meant))
    return _called(asked)


def _sized(device: Device, gib: float | None) -> Device | None:
    """The device with this much memory; None where it is not to be had so."""
    if gib is None or any(names.read(name).gib == gib for name in _names(device)):
        return device
    if gib in device.memory_options_gib or (device.kind == "cpu" and device.memory_gib is None):
        return device if gib == device.memory_gib else device.with_memory(gib)
    return device if device.memory_gib and abs(gib / device.memory_gib - 1) < _NEAR else None


def _sizes(device: Device) -> str:
    return ", ".join(f"{gib:g}" for gib in device.memory_options_gib or (device.memory_gib or 0,))


_OTHER = "a JSON file can describe any other: --device my-card.json"


def _closest(name: str, asked: names.Name) -> str:
    keys = {key: entries[0][0].id for key, entries in _index().items()}
    near = difflib.get_close_matches(asked.key + asked.cores, keys, 5, 0.65)
    alike = difflib.get_close_matches(name.strip().lower(), [d.id for d in catalogue()], 3, 0.6)
    ids = list(dict.fromkeys([*(keys[key] for key in near), *alike]))[:4]
    return (f"the closest are {', '.join(ids)}; " if ids else "") + f"`qkit devices` lists all; {_OTHER}"
