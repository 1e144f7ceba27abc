"""One callable decides each tensor: `(name, meta) -> LayerSpec | reason it is left alone`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from ..errors import QkitError
from ..spec import AUTO_GROUP_SIZES, CHANNEL, LayerSpec
from ..spec.dtypes import FLOATS, TensorMeta

# A decoder block's tensors carry its index after one of these words; everything else is left alone.
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_TOWERS = re.compile(r"(?:^|\.)(?:vision|visual|vit|audio|image|mm_|multi_modal|multimodal|speech)[a-z_]*\.")
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "output", "embed_out", "score"}
# `gate` alone is a MoE router (a gated MLP has gate_proj); it is small and every expert hangs on it.
_ROUTERS = {"gate", "router", "shared_expert_gate"}

Chooser = Callable[[str, TensorMeta], "LayerSpec | str"]


def module_of(name: str) -> str:
    """ "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"."""
    return name.rpartition(".")[0]


def left_alone(name: str, meta: TensorMeta) -> str | None:
    """Why a tensor is not a decoder block's linear weight, or None where it is one."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if len(meta.shape) == 3 and "experts" in name:
        return "fused 3-D experts"
    if kind != "weight" or len(meta.shape) < 2:
        return "bias or norm"
    if not meta.numel:
        return "empty"
    if last in EMBEDDINGS:
        return "embedding"
    if last in _HEADS:
        return "output head"
    if len(meta.shape) != 2:
        return f"{len(meta.shape)}-D, not a linear weight"
    if _TOWERS.search(name):
        return "vision or audio tower"
    if not BLOCK.search(name):
        return "outside the decoder blocks"
    if last in _ROUTERS:
        return "router"
    if "norm" in last:
        return "bias or norm"
    if meta.dtype not in FLOATS:
        return f"stored as {meta.dtype}"
    return None


def chooser(scheme: LayerSpec | None, skip: Iterable[str] = ()) -> Chooser:
    """The default policy: every linear of every decoder block, except those `skip` patterns match.

    skip: shell patterns on module names ("*.down_proj", "model.layers.0.*")."""
    patterns = tuple(skip)

    def choose(name: str, meta: TensorMeta) -> LayerSpec | str:
        reason = left_alone(name, meta)
        if reason is not None:
            return reason
        if scheme is None:
            return "kept as it is"
        if any(fnmatchcase(module_of(name), p) or fnmatchcase(name, p) for p in patterns):
            return "skipped on request"
        return scheme

    return choose


def check_skip(skip: Iterable[str], names: Iterable[str]) -> None:
    """Raises QkitError for a pattern that matches no tensor: most often a typing error."""
    known = list(names)
    for pattern in skip:
        if not any(fnmatchcase(module_of(n), pattern) or fnmatchcase(n, pattern) for n in known):
            raise QkitError(
                f"--skip {pattern!r} matches no tensor",
                "patterns are shell patterns on module names, for example '*.down_proj' or 'model.layers.0.*'",
            )


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


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(str(s) for s in sizes)
