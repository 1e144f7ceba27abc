"""The KV cache of a result: scales of keys and values as tensors of the checkpoint, calibrated or the source's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.config import model_dtype
from ..models.families import KV_SCALES, is_kv_scale
from ..models.skeleton import check_architecture
from ..sources.types import Rows, Source, Wrapped
from ..spec.dtypes import E4M3_MAX, TensorMeta, torch_dtype
from .options import AS_STORED, Options

if TYPE_CHECKING:
    import torch

    from ..formats.base import Format
    from ..formats.expanded import Expanded


class CacheScales(Wrapped):
    """`types.Source`: without the cache's scales that the source holds, and with those that calibration finds.

    attentions: the modules that get a k_scale and a v_scale [1] each; they can be read once `largest` holds the
    magnitudes of what they scale, by name."""

    def __init__(self, source: Source, attentions: list[str]):
        super().__init__(source)
        # As clients hold them: in the model's type, so that nothing is rounded a second time.
        dtype = model_dtype(source.config)
        self._meta = TensorMeta(dtype if dtype in ("BF16", "F16", "F32") else "BF16", (1,))
        self.scales = [f"{module}.{local}" for module in attentions for local in KV_SCALES]
        self._own = frozenset(self.scales)
        self.largest: Mapping[str, float] = {}
        self._holds([*(name for name in source.names() if not is_kv_scale(name)), *self.scales])

    def meta(self, name: str) -> TensorMeta:
        return self._meta if name in self._own else self.source.meta(name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._own:
            return self.source.read(name)
        import torch

        dtype = torch_dtype(self._meta.dtype)
        # 1 where nothing was ever seen but zeros; never 0, by which clients would divide.
        scale = max(self.largest[name] / E4M3_MAX, torch.finfo(dtype).tiny) if self.largest[name] else 1.0
        return torch.tensor([scale], dtype=dtype)

    def rows(self, name: str) -> Rows | None:
        return None if name in self._own else self.source.rows(name)


def with_cache(
    source: Source, expanded: Expanded | None, fmt: Format, options: Options
) -> tuple[Source, Options, list[str]]:
    """The source with the scales that the result holds, the options with what becomes of the cache, and what to say.

    Raises QkitError where a quantized cache is wanted and the format or qkit's model code has none."""
    stored = None if expanded is None else expanded.kv_cache
    if options.kv_cache is not None:
        if options.kv_cache not in fmt.kv_caches:
            raise QkitError(
                f"format {fmt.name} cannot say that the KV cache is {options.kv_cache}",
                "use --format compressed-tensors, or leave --kv-cache out",
            )
        try:
            check_architecture(source.config)
        except QkitError as error:
            raise QkitError(
                f"--kv-cache runs the model to find its scales: {error.message}",
                "leave --kv-cache out: " + (error.hint or ""),
            ) from error
        modules = (name.partition(".self_attn.") for name in source.names())
        attentions = list(dict.fromkeys(f"{block}.self_attn" for block, inside, _ in modules if inside))
        notes = ["the scales of the source's KV cache are calibrated anew"] if stored else []
        return CacheScales(source, attentions), options, notes
    if stored is None:
        return source, options, []
    if stored in fmt.kv_caches:
        return source, replace(options, kv_cache=AS_STORED), []
    dropped = f"the KV cache stays at 16 bits: format {fmt.name} has no place for the scales of the source's"
    return CacheScales(source, []), options, [dropped]
