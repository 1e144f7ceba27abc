"""The recipe of a conversion: made of its options, then settled layer by layer for one checkpoint and format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.families import module_of, why_kept
from ..spec import AUTO_GROUP_SIZES, CHANNEL, Keep, LayerSpec, Recipe, Rule
from ..spec.dtypes import TensorMeta
from ..spec.recipe import parse_rules, rule_for
from ..storage.local import read_small
from ..untrusted import MAX_YAML_BYTES, parse_yaml
from .options import Options, group_size

if TYPE_CHECKING:
    from ..formats.base import Format

# Engines load these as one layer, with one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def make_recipe(options: Options) -> Recipe:
    """--skip, then the rules of --recipe, then --scheme for everything else. Raises QkitError for a file that holds no
    recipe."""
    skipped = [Rule(p, Keep("skipped on request"), origin=f"--skip {p!r}") for p in options.skip]
    listed = [] if options.recipe is None else read_rules(options.recipe, options.group_size)
    rest = rule_for("*", options.scheme or "w4a16", options.group_size, kept="kept as it is")
    rules = (*skipped, *listed, rest)
    return Recipe(
        rules if options.block_size is None else tuple(_in_blocks(rule, options.block_size) for rule in rules)
    )


def _in_blocks(rule: Rule, size: int) -> Rule:
    if not isinstance(rule.scheme, LayerSpec):
        return rule
    if rule.scheme.kind not in ("nf4", "fp4"):
        raise QkitError(f"--block-size belongs to nf4 and fp4, not to {rule.scheme.describe()}", "use --group-size")
    return replace(rule, scheme=rule.scheme.with_group_size(size))


def read_rules(path: str, default_group: int | None) -> list[Rule]:
    """The rules in a recipe file, YAML or JSON: see `spec.recipe.parse_rules`."""
    file = Path(path).expanduser()
    try:
        text = read_small(file, MAX_YAML_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise QkitError(f"the recipe {path} is not UTF-8 text") from None
    try:
        given = parse_yaml(text)
    except ValueError as error:
        raise QkitError(f"the recipe {path} is not valid YAML: {error}") from None
    return parse_rules(given, path, group_size, default_group)


@dataclass(frozen=True)
class Settled:
    """recipe: with every group size and what the format dictates; choices: tensor name -> its scheme, or why it is
    kept; notes: what was chosen for the user."""

    recipe: Recipe
    choices: Mapping[str, LayerSpec | Keep]
    notes: tuple[str, ...]


def settle(recipe: Recipe, metas: Mapping[str, TensorMeta], fmt: Format, model_dtype: str) -> Settled:
    """Apply the rules to a checkpoint's tensors.

    Raises QkitError for a rule that the user wrote and that matches nothing quantizable, for group sizes that do not
    divide, and for what the format cannot hold."""
    decided: list[dict[str, tuple[int, ...]]] = [{} for _ in recipe.rules]
    choices: dict[str, LayerSpec | Keep] = {}
    at: dict[str, int] = {}
    for name, meta in metas.items():
        reason = why_kept(name, meta)
        rule = recipe.rule(module_of(name)) if reason is None else None
        if rule is None:
            choices[name] = Keep(reason or "no rule of the recipe matches")
            continue
        at[name] = recipe.rules.index(rule)
        decided[at[name]][name] = meta.shape
    notes: list[str] = []
    rules = []
    for rule, shapes in zip(recipe.rules, decided, strict=True):
        if not shapes and rule.origin:
            _refuse_unused(rule, metas)
        rules.append(_settle_rule(rule, shapes, fmt, model_dtype, notes))
    choices |= {name: rules[index].scheme for name, index in at.items()}
    notes += _split_layers(choices)
    return Settled(Recipe(tuple(rules)), {name: choices[name] for name in metas}, tuple(notes))


def _refuse_unused(rule: Rule, metas: Mapping[str, TensorMeta]) -> None:
    matching = [name for name in metas if rule.matches(module_of(name))]
    if not matching:
        raise QkitError(
            f"{rule.origin} matches no tensor",
            "patterns are shell patterns on module names, for example '*.down_proj' or 'model.layers.0.*'",
        )
    kept = next((reason for name in matching if (reason := why_kept(name, metas[name]))), None)
    if isinstance(rule.scheme, LayerSpec):
        if kept:
            raise QkitError(f"{rule.origin}: {matching[0]} cannot be quantized: {kept}", "take the rule out")
        raise QkitError(f"{rule.origin}: earlier rules decide all that it matches", "move it up, or take it out")


def _settle_rule(
    rule: Rule, shapes: Mapping[str, tuple[int, ...]], fmt: Format, model_dtype: str, notes: list[str]
) -> Rule:
    if not isinstance(rule.scheme, LayerSpec):
        return rule
    scheme = rule.scheme
    if scheme.kind == "int" and scheme.input is None and shapes:
        scheme = pick_group_size(scheme, None if rule.any_group else scheme.group_size, shapes)
        if rule.any_group:
            of = "every layer" if rule.modules == "*" else rule.modules
            notes.append(
                f"group size {scheme.group_size} (the largest of {_listed(AUTO_GROUP_SIZES)} that divides {of})"
            )
    scheme = fmt.scheme_for(scheme, model_dtype)
    for name, shape in shapes.items():
        problem = fmt.check((shape[0], shape[1]), scheme)
        if problem:
            raise QkitError(f"{name}: {problem}", "use another --format, or leave the layer alone with --skip")
    return replace(rule, scheme=scheme, any_group=False)


def pick_group_size(scheme: LayerSpec, requested: int | None, shapes: Mapping[str, tuple[int, ...]]) -> LayerSpec:
    """`scheme` with its group size settled for weights of `shapes` (name -> [out, in]).

    requested None: the largest of 128, 64, 32 that divides every input width. A requested size that does not
    divide raises QkitError naming a layer and the sizes that do.
    """
    widths = {shape[1] for shape in shapes.values()}
    fitting = [g for g in AUTO_GROUP_SIZES if all(w % g == 0 for w in widths)]
    if requested is None:
        if fitting:
            return scheme.with_group_size(fitting[0])
        name = next(n for n, s in shapes.items() if s[1] % AUTO_GROUP_SIZES[-1])
        raise QkitError(
            f"no group size of {_listed(AUTO_GROUP_SIZES)} divides every layer ({name} is {shapes[name][1]} wide)",
            "use --group-size channel, or leave that layer alone with --skip",
        )
    if requested == CHANNEL:
        return scheme.with_group_size(CHANNEL)
    settled = scheme.with_group_size(requested)  # validates the size itself
    bad = next((n for n, s in shapes.items() if s[1] % requested), None)
    if bad is not None:
        usable = [str(g) for g in fitting] + ["channel"]
        raise QkitError(
            f"group size {requested} does not divide {bad}, which is {shapes[bad][1]} wide",
            "sizes that divide every quantized layer: " + ", ".join(usable),
        )
    return settled


def _split_layers(choices: Mapping[str, LayerSpec | Keep]) -> list[str]:
    """What to say of layers that engines fuse and the recipe stores differently."""
    modules = {module_of(name): choice for name, choice in choices.items() if name.endswith(".weight")}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        names = next((names for names in _FUSED if names[0] == leaf), ())
        kinds = [modules.get(f"{parent}.{other}") for other in names]
        schemes = {kind if isinstance(kind, LayerSpec) else None for kind in kinds if kind is not None}
        if len(schemes) > 1:
            together = ", ".join(names)
            return [f"{parent}: {together} are stored differently; vLLM loads them as one layer and will refuse"]
    return []


def _listed(sizes: Iterable[int] | Sequence[int]) -> str:
    return ", ".join(str(s) for s in sizes)
