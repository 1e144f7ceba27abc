"""Which module is stored how: ordered rules on module names, the first that matches decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import QkitError
from .layer import LayerSpec
from .presets import PRESETS, preset

KEEP = "keep"  # a rule's scheme in a recipe file: the weights stay as the source has them
_KEYS = ("modules", "scheme", "group_size")
_HINT = "a rule is {modules: '*.down_proj', scheme: w8a16, group_size: 64}; the group size may be left out"


@dataclass(frozen=True)
class Keep:
    """The weights stay as the source has them, for `reason`."""

    reason: str


@dataclass(frozen=True)
class Rule:
    """modules     a shell pattern on module names: "*.down_proj", "model.layers.0.*"
    scheme      how their weights are stored, or that they are kept
    any_group   the group size of `scheme` is still to be chosen, for the layers that the rule decides
    origin      what the user wrote it in, for messages: "--skip"; "" for a rule that need not match anything
    """

    modules: str
    scheme: LayerSpec | Keep
    any_group: bool = False
    origin: str = ""

    def matches(self, module: str) -> bool:
        """A pattern may also name the module's weight."""
        return fnmatchcase(module, self.modules) or fnmatchcase(f"{module}.weight", self.modules)


@dataclass(frozen=True)
class Recipe:
    """The rules, in order. Presets, --skip, recipe files and allocators make one; nothing else decides a layer."""

    rules: tuple[Rule, ...]

    def rule(self, module: str) -> Rule | None:
        """The first rule that matches."""
        return next((rule for rule in self.rules if rule.matches(module)), None)

    @property
    def schemes(self) -> list[LayerSpec]:
        """The different ones, in the order of the rules."""
        return list(dict.fromkeys(rule.scheme for rule in self.rules if isinstance(rule.scheme, LayerSpec)))

    def as_list(self) -> list[dict[str, Any]]:
        """JSON of what decides the result."""
        return [
            {
                "modules": rule.modules,
                "scheme": asdict(rule.scheme) if isinstance(rule.scheme, LayerSpec) else {KEEP: rule.scheme.reason},
            }
            for rule in self.rules
        ]


def rule_for(modules: str, scheme: str, group_size: int | None, origin: str = "", kept: str = "") -> Rule:
    """The rule for a scheme that a user named, "keep" and "none" included. group_size None: to be chosen.

    Raises QkitError for an unknown scheme."""
    found = None if scheme == KEEP else preset(scheme)
    if found is None:
        return Rule(modules, Keep(kept or "kept by the recipe"), origin=origin)
    if found.kind == "ggml" and group_size is not None:
        raise QkitError(f"{scheme} has blocks of its own size", "leave --group-size out")
    if found.kind in ("nf4", "fp4") and group_size is not None:
        raise QkitError(
            f"{scheme} has no groups: its blocks run along the flattened matrix", "use --block-size 64 (32 to 4096)"
        )
    grouped = found.kind == "int" and found.input is None
    if group_size and not grouped:
        raise QkitError(f"{scheme} has no group size to choose: it is {found.describe()}", "leave --group-size out")
    if group_size is None or not grouped:
        return Rule(modules, found, any_group=grouped, origin=origin)
    return Rule(modules, found.with_group_size(group_size), origin=origin)


def parse_rules(given: Any, name: str, group_size: Any, default_group: int | None) -> list[Rule]:
    """The rules of a recipe file's content: a list of {modules, scheme, group_size}.

    name           what messages call the file
    group_size     (value, name) -> inputs per scale, raising QkitError
    default_group  of rules that name none; None: to be chosen
    Raises QkitError, naming the rule, for anything else than that.
    """
    if not isinstance(given, list) or not given:
        raise QkitError(f"{name} is not a list of rules", _HINT)
    rules = []
    for number, entry in enumerate(given, 1):
        at = f"{name}, rule {number}"
        if not isinstance(entry, Mapping) or "modules" not in entry or "scheme" not in entry:
            raise QkitError(f"{at} has no modules or no scheme", _HINT)
        unknown = [key for key in entry if key not in _KEYS]
        if unknown:
            raise QkitError(f"{at}: unknown key {unknown[0]!r}", _HINT)
        patterns = entry["modules"] if isinstance(entry["modules"], list) else [entry["modules"]]
        scheme = entry["scheme"]
        if not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise QkitError(f"{at}: modules must be a pattern or a list of patterns, not {entry['modules']!r}", _HINT)
        if not isinstance(scheme, str):
            raise QkitError(f"{at}: the scheme must be a name, not {scheme!r}", ", ".join([*PRESETS, KEEP]))
        own = entry.get("group_size")
        size = default_group if own is None else group_size(own, f"{at}: group_size")
        try:
            rules += [rule_for(pattern, scheme, size, origin=f"{at} ({pattern!r})") for pattern in patterns]
        except QkitError as error:
            raise QkitError(f"{at}: {error.message}", error.hint) from error
    return rules
