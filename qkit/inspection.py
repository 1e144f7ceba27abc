"""What a checkpoint holds, and whether it is still what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import units
from .errors import QkitError
from .models.config import architectures, text_config
from .models.families import is_kv_scale
from .progress import track

if TYPE_CHECKING:
    from . import formats
    from .sources.types import Source
    from .spec.dtypes import TensorMeta
    from .storage.manifest import Manifest


@dataclass(frozen=True)
class Inspection:
    """Facts of a checkpoint; problems is None where nothing was verified, empty where all hashes agree."""

    model: str
    base_model: str
    architecture: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    quantization: dict[str, Any] | None
    schemes: dict[str, int]
    kv_cache: str | None
    converted_by: str | None
    calibration: dict[str, Any] | None
    fallbacks: dict[str, str]
    problems: list[str] | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.parameters)

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "bits_per_weight": self.bits_per_weight}


def inspect(model: str, *, verify: bool = False) -> Inspection:
    """Read the headers of `model` (folder, .gguf, Hub id, "demo"); with `verify`, every hash of its manifest.

    Raises QkitError where it cannot be read, or has no manifest to verify."""
    from . import formats
    from .sources import open_source
    from .sources.sliced import sliced
    from .storage.manifest import MANIFEST, Manifest

    source = open_source(model)
    folder = source.folder  # not the user's words: `demo` beside a folder of that name is not that folder
    manifest = Manifest.find(folder)
    if verify and manifest is None:
        raise QkitError(f"{model} has no {MANIFEST}", "only folders written by qkit convert can be verified")
    metas = {name: source.meta(name) for name in source.names()}
    reader = formats.reader(source.config)
    schemes: Counter[str] = Counter()
    parameters = sum(m.numel for n, m in metas.items() if not is_kv_scale(n))
    if reader is not None:
        one_by_one = sliced(source) or source
        parameters, schemes = _logical(one_by_one, {n: one_by_one.meta(n) for n in one_by_one.names()}, reader)
    problems = None
    if verify and manifest is not None:
        with track("verifying", sum(f["bytes"] for f in manifest.files.values()), "bytes") as advance:
            assert folder is not None
            problems = manifest.verify(folder, advance)
    text = text_config(source.config)
    return Inspection(
        model=model,
        base_model=_noted(manifest, "source").get("base_model", source.base_model),
        architecture=", ".join(architectures(source.config) or [str(text.get("model_type", "unknown"))]),
        tensors=len(metas),
        parameters=parameters,
        nbytes=source.stored.nbytes,
        dtypes=source.stored.types,
        quantization=source.config.get("quantization_config"),
        schemes=dict(schemes),
        kv_cache=formats.kv_cache(reader),
        converted_by=f"qkit {manifest.identity.get('qkit')}" if manifest else None,
        calibration=without_sketch(_noted(manifest, "calibration")) or None,
        fallbacks={n: t["fallback"] for n, t in manifest.tensors.items() if t.get("fallback")} if manifest else {},
        problems=problems,
    )


def _noted(manifest: Manifest | None, what: str) -> dict[str, Any]:
    """A part of a manifest's identity; {} where there is none."""
    found = manifest.identity.get(what) if manifest else None
    return found if isinstance(found, dict) else {}


def without_sketch(calibration: Any) -> Any:
    """A manifest's calibration without the sketch, which says nothing to a reader; what is none as it is."""
    if not isinstance(calibration, dict):
        return calibration
    return {k: v for k, v in calibration.items() if k != "sketch"}


def _logical(source: Source, metas: dict[str, TensorMeta], reader: formats.FormatReader) -> tuple[int, Counter[str]]:
    """(parameters, scheme -> layers): a packed weight counts as the weights it stands for."""
    from .formats import local_names, quantized_modules

    schemes: Counter[str] = Counter()
    parameters = sum(m.numel for n, m in metas.items() if not is_kv_scale(n))
    for module, scheme in quantized_modules(reader, source).items():
        schemes[scheme.describe()] += 1
        stored = {local: metas[f"{module}.{local}"] for local in local_names(reader, source, module, scheme)}
        codes = stored[reader.required(scheme)[0]]
        parameters += codes.nbytes * 8 // scheme.bits - sum(m.numel for m in stored.values())
    return parameters, schemes


def describe(result: Inspection) -> str:
    lines = [
        f"{result.model}",
        f"  architecture  {result.architecture}",
        f"  parameters    {result.parameters:,} in {result.tensors} tensors",
        f"  stored        {units.size(result.nbytes)}, {result.bits_per_weight:.2f} bits per weight",
        "  dtypes        " + ", ".join(f"{n} x {d}" for d, n in sorted(result.dtypes.items())),
    ]
    if result.quantization:
        lines.append(f"  quantization  {result.quantization.get('quant_method', 'unknown')}")
    lines += [f"                {n} layers {s}" for s, n in sorted(result.schemes.items())]
    if result.kv_cache:
        lines.append(f"  KV cache      {result.kv_cache}, with a scale of keys and one of values for each layer")
    if result.converted_by:
        lines.append(f"  written by    {result.converted_by} from {result.base_model}")
    if result.calibration:
        c = result.calibration
        lines.append(f"  calibration   {c.get('samples')} x {c.get('length')} tokens of {c.get('name')}")
    lines += [f"  WARNING       {n} fell back to rounding: {why}" for n, why in result.fallbacks.items()]
    if result.problems is not None:
        lines += [f"  FAILED        {p}" for p in result.problems] or ["  verified      every hash agrees"]
    return "\n".join(lines)
