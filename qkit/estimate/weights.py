"""Bytes of a model's weights by class: of a checkpoint from its headers, of a config in any format that qkit writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.architecture import Architecture, Matrix
from ..spec import Keep, LayerSpec, Recipe, Rule, preset
from ..spec.dtypes import ITEMSIZE, TensorMeta
from ..spec.recipe import rule_for
from . import gguf, headers
from .parts import CLASSES, Part, Weights

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source

__all__ = ["CLASSES", "Part", "Weights", "of_architecture", "of_source"]


def of_source(source: Source) -> Weights:
    """Of a checkpoint, from its headers: the sum is exactly the bytes of its tensors. Reads no tensor."""
    return headers.of_source(source)


def of_architecture(
    arch: Architecture,
    scheme: str | LayerSpec | None = None,
    format: Format | str = "safetensors",
    dtype: str = "BF16",
    importance: bool = False,
) -> Weights:
    """Of a model in a format, as `qkit convert` writes it; tensors that are not quantized are `dtype`.

    scheme  a preset's name, whose group size is chosen as `convert` does; one settled scheme for all; None: nothing is
            quantized
    importance  of gguf: whether errors are weighed by a calibration text (method imatrix), on which some mixes look
    Raises QkitError, as a conversion would, for a scheme that the format does not hold or that does not divide."""
    from .. import formats

    fmt = formats.get(format) if isinstance(format, str) else format
    if dtype not in ITEMSIZE:
        raise QkitError(f"{dtype!r} is no type of tensors", "known: " + ", ".join(ITEMSIZE))
    if fmt.container == "gguf":
        return _in_gguf(arch, scheme, dtype, importance)
    choices = _choices(arch, scheme, fmt, dtype)
    made: dict[tuple[int, int, LayerSpec], tuple[int, int]] = {}
    parts = []
    for m in arch.matrices:
        choice = choices.get(m.name)
        active = read_of(arch, m)
        if choice is None:
            parts.append(Part(m.role, m.numel * ITEMSIZE[dtype], 0, m.count, active))
            continue
        key = (m.out, m.inp, choice)
        if key not in made:
            metas = fmt.out_metas((m.out, m.inp), choice)
            codes = sum(meta.nbytes for local, meta in metas.items() if local in headers.CODES)
            made[key] = codes, sum(meta.nbytes for meta in metas.values()) - codes
        codes, scales = made[key]
        parts.append(Part(m.role, codes * m.count, scales * m.count, m.count, active, quantized=True))
    return Weights.of([*parts, *small(arch, ITEMSIZE[dtype])])


def read_of(arch: Architecture, m: Matrix) -> float:
    """Matrices of a place that one token reads: none of a table, nor of what runs once a prompt or not at all."""
    if m.role == "embedding" and arch.tied and m is arch.embedding:
        return 1
    return 0 if m.role in ("embedding", "tower", "mtp", "encoder") else m.active


def small(arch: Architecture, itemsize: int) -> Iterable[Part]:
    """Norms and biases."""
    experts = sum(layer.expert_vectors for layer in arch.layers)
    yield Part("norm", (arch.vectors + sum(layer.vectors for layer in arch.layers) - experts) * itemsize)
    yield Part("tower", arch.towers_vectors * itemsize, active=0)
    yield Part("mtp", arch.mtp_vectors * itemsize, active=0)
    if experts:
        places = next(m for layer in arch.layers for m in layer.matrices if m.role == "expert")
        yield Part("expert", experts * itemsize, 0, places.count, places.active)


def _choices(arch: Architecture, scheme: str | LayerSpec | None, fmt: Format, dtype: str) -> dict[str, LayerSpec]:
    """Name of a matrix -> its settled scheme, for those that are quantized, by the rules that `convert` follows."""
    from ..conversion.recipe import settle

    if scheme is None:
        return {}
    rule = rule_for("*", scheme, None) if isinstance(scheme, str) else Rule("*", scheme)
    if isinstance(rule.scheme, Keep):
        return {}
    if rule.scheme.kind not in fmt.kinds:
        raise QkitError(f"format {fmt.name} does not hold {rule.scheme.describe()}", "choose another scheme or format")
    # An expert stands for all of them, and what no recipe reaches is not asked.
    asked = {
        f"{m.name.replace('.*.', '.0.')}.weight": m for m in arch.matrices if m.role not in ("other", "tower", "mtp")
    }
    metas = {name: TensorMeta(dtype, (m.out, m.inp)) for name, m in asked.items()}
    choices, _ = fmt.choose(settle(Recipe((rule,)), metas, fmt, dtype).choices, False)
    found = {asked[name].name: choice for name, choice in choices.items() if isinstance(choice, LayerSpec)}
    if not found:
        raise QkitError(f"format {fmt.name} quantizes nothing of {arch.model_type}", "choose another format")
    return found


def _in_gguf(arch: Architecture, scheme: str | LayerSpec | None, dtype: str, importance: bool) -> Weights:
    spec = preset(scheme) if isinstance(scheme, str) else scheme
    if spec is not None and spec.kind != "ggml":
        raise QkitError(f"GGUF does not hold {spec.describe()}", "use a mix such as q4_k_m")
    parts = []
    for m, nbytes, quantized in gguf.tensors(arch, spec.grid.block if spec else None, dtype, importance):
        parts.append(Part(m.role, nbytes, 0, m.count, read_of(arch, m), quantized))
    left = replace(arch, towers_vectors=0, mtp_vectors=0)  # files for llama.cpp hold the text model alone
    return Weights.of([*parts, *small(left, ITEMSIZE["F32"])])
