"""GPTQ checkpoints, v1 ("gptq", what AutoGPTQ wrote and every engine reads) and v2 ("gptq_v2").

Reference: GPTQModel, nn_modules/qlinear/__init__.py, utils/model.py (v1 <-> v2), quantization/config.py.
The two differ in one thing: v1 stores zero - 1, v2 stores zero. A zero of 0 has no form in v1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..spec import CHANNEL, LayerSpec, integer
from ..spec.dtypes import TensorMeta
from .base import Format, as_object, check_pattern, check_tensors, column_order, in_order, matrix_shape, pattern_matches

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..sources.types import Source

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word
_OWN = ("desc_act", "checkpoint_format", "quantizer")  # ours to say, not the caller's
_SLAB = 1 << 16  # codes of 2 and 3 bits at a time, 48 bytes each: bounds what is held beside the result
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel accepts, beside -1


@dataclass(frozen=True)
class GPTQ(Format):
    """qweight int32 [in*b/32, out], packed along in; qzeros int32 [groups, out*b/32], packed along out;
    scales F16 [groups, out]; g_idx int32 [in], in what is quantized here always i // group_size.
    """

    name: str = "gptq"
    quant_method: ClassVar[str | None] = "gptq"
    holds_head: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    rows_follow: ClassVar[bool] = False

    @property
    def v1(self) -> bool:
        return self.name == "gptq"

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        if scheme.input is not None:
            raise QkitError("GPTQ folders say nothing of activations", "use format compressed-tensors for w8a8")
        if scheme.group_size != CHANNEL and scheme.group_size not in _GROUP_SIZES:
            sizes = ", ".join(map(str, _GROUP_SIZES))
            raise QkitError(f"GPTQ has no group size {scheme.group_size}", f"use {sizes} or 'channel'")
        return scheme.stored_with("F16", min_zero=1 if self.v1 and not scheme.symmetric else 0)

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        out, in_ = shape
        if out % 32 or in_ % 32:
            return f"GPTQ needs both sides divisible by 32, not {out} x {in_}"
        if scheme.group_size != CHANNEL and in_ % scheme.group_size:
            return f"group size {scheme.group_size} does not divide its {in_} inputs"
        return None

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        out, in_ = shape
        groups = scheme.groups(in_)
        return {
            "qweight": TensorMeta("I32", (in_ * scheme.bits // 32, out)),
            "qzeros": TensorMeta("I32", (groups, out * scheme.bits // 32)),
            "scales": TensorMeta("F16", (groups, out)),
            "g_idx": TensorMeta("I32", (in_,)),
        }

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        """Raises ValueError for what the format cannot hold (`scheme_for` and `check` come first)."""
        import torch

        from ..kernels import pack_transposed
        from ..kernels.codes import codes_of

        out, in_, bits = weight.out_features, weight.in_features, scheme.bits if scheme else weight.bits
        reason = self.check((out, in_), weight.spec)
        if reason or weight.scale.dtype != torch.float16:
            raise ValueError(reason or f"GPTQ stores float16 scales, not {weight.scale.dtype}")
        zero = weight.zero
        if zero is None:
            zero = torch.full(weight.scale.shape, 1 << (bits - 1), dtype=torch.uint8)
        if self.v1:
            if bool((zero == 0).any()):
                raise ValueError("GPTQ v1 has no form for a zero point of 0 (it stores zero - 1)")
            zero = zero - 1
        codes, g_idx = codes_of(weight), torch.arange(in_, dtype=torch.int32) // weight.group_size
        if weight.order is not None:
            back = torch.argsort(weight.order)
            codes, g_idx = codes[:, back].contiguous(), g_idx[back]
        return {
            "qweight": _packed(codes, bits).t().contiguous() if bits in (2, 3) else pack_transposed(codes, bits),
            "qzeros": _packed(zero.t().contiguous(), bits),
            "scales": weight.scale.t().contiguous(),
            "g_idx": g_idx,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        from ..kernels.codes import weight_of
        from ..kernels.weight import Weight

        qweight = tensors["qweight"]
        if qweight.dim() != 2:
            raise QkitError(f"qweight has shape {list(qweight.shape)}, not two dimensions")
        shape = (qweight.shape[1], qweight.shape[0] * 32 // scheme.bits)
        reason = self.check(shape, scheme)
        if reason:
            raise QkitError(reason)
        expected = self.out_metas(shape, scheme)
        if "g_idx" not in tensors:  # some writers leave the trivial one out
            del expected["g_idx"]
        check_tensors(tensors, expected)
        order = column_order(tensors["g_idx"], scheme) if "g_idx" in tensors else None
        found = self._zero_points(tensors["qzeros"], scheme.bits, shape[0])
        if scheme.symmetric and bool((found != scheme.mid).any()):
            raise QkitError(
                f"the config says symmetric {self.name}, but its zero points are "
                f"{int(found.min())} to {int(found.max())}, not {scheme.mid}",
                "is checkpoint_format right? v1 (gptq) stores zero - 1, v2 (gptq_v2) stores zero",
            )
        zero = None if scheme.symmetric else found.t().contiguous()
        packed, scales = qweight.t().contiguous(), tensors["scales"].t().contiguous()
        if scheme.bits in (2, 3):
            weight = weight_of(_unpacked(packed, scheme.bits, shape[1]), scales, zero, scheme.bits)
            packed, zero = weight.packed, weight.zero
        held = max(4, scheme.bits)
        if order is not None:
            packed = in_order(packed, held, order)
        return Weight(packed, scales, zero, held, shape[1], order=order)

    def _zero_points(self, words: torch.Tensor, bits: int, out: int) -> torch.Tensor:
        """uint8 [groups, out]. Of v1 on whole words, as GPTQModel does it: the borrow of a zero of 0 written by others
        comes back right; fields of 3 bits cross words."""
        if self.v1 and bits != 3:
            words = words + _ONES[bits]
        zero = _unpacked(words, bits, out)
        return (zero + 1) & 7 if self.v1 and bits == 3 else zero

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        rows, out = matrix_shape(source, f"{module}.qweight")
        return out, rows * 32 // scheme.bits

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Readers give every linear of a decoder block the settings at the top; `dynamic` has the exceptions.
        options: plain values (damp_percent, method, ...) go into `meta` as they are."""
        from .. import __version__

        settings = [_settings(scheme) for scheme in schemes.values()]
        # The commonest is the rule; ties go to the first in the model.
        kinds = Counter(tuple(s.values()) for s in settings)
        base = dict(zip(settings[0], kinds.most_common(1)[0][0], strict=True))
        dynamic: dict[str, dict[str, Any]] = {_exactly("-:", module): {} for module in ignored if module != "lm_head"}
        for module, setting in zip(schemes, settings, strict=True):
            if setting != base:
                dynamic[_exactly("+:", module)] = setting
        facts = {k: v for k, v in options.items() if isinstance(v, (str, int, float)) and k not in _OWN}
        config = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "format": self.name,
            **base,
            "desc_act": False,
            "lm_head": "lm_head" in schemes,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"qkit:{__version__}"], "static_groups": True, **facts},
        }
        return {**config, "dynamic": dynamic} if dynamic else config

    def extra_files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        return {"quantize_config.json": (json.dumps(quantization_config, indent=2) + "\n").encode()}

    def parse(self, quantization_config: Mapping[str, Any]) -> GPTQReader:
        given = quantization_config
        name = given.get("checkpoint_format") or given.get("format") or "gptq"
        if name not in ("gptq", "gptq_v2"):
            raise QkitError(f"GPTQ checkpoint_format {name!r} is not supported", "supported: gptq, gptq_v2")
        if given.get("pack_dtype", "int32") not in ("int32", None):
            raise QkitError(f"GPTQ pack_dtype {given['pack_dtype']!r} is not supported", "supported: int32")
        dynamic = as_object(given.get("dynamic"), "dynamic")
        for pattern, override in dynamic.items():
            check_pattern(_bare(pattern))
            _parse_scheme({**given, **as_object(override, pattern)})
        return GPTQReader(GPTQ(name), _parse_scheme(given), given, dynamic)


@dataclass(frozen=True)
class GPTQReader:
    """`dynamic` overrides the settings at the top: {"+:pattern": {...}} changes them, {"-:pattern": {}} means
    not quantized; the first pattern that matches the name's start wins (GPTQModel `dynamic_get`)."""

    format: GPTQ
    base: LayerSpec
    settings: Mapping[str, Any]
    dynamic: Mapping[str, Mapping[str, Any]]
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    scale: ClassVar[str] = "scales"
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)

    def scheme(self, module: str) -> LayerSpec | None:
        for pattern, override in self.dynamic.items():
            if pattern_matches(_bare(pattern), module):
                return None if pattern.startswith("-:") else _parse_scheme({**self.settings, **(override or {})})
        return self.base

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n] -> int32 [rows, n * bits / 32]: a stream of bits, low ones first, that runs across words."""
    import torch

    from ..kernels import pack

    if bits in (4, 8):
        return pack(codes, bits)
    places, bit = torch.arange(32), torch.arange(bits, dtype=torch.uint8)
    out = torch.empty(codes.shape[0], codes.shape[1] * bits // 32, dtype=torch.int32)
    step = max(1, _SLAB // codes.shape[1])
    for a in range(0, len(codes), step):
        stream = ((codes[a : a + step].unsqueeze(-1) >> bit) & 1).view(-1, out.shape[1], 32)
        out[a : a + step] = (stream.long() << places).sum(-1).to(torch.int32)
    return out


def _unpacked(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `_packed`."""
    import torch

    from ..kernels import unpack

    if bits in (4, 8):
        return unpack(words, bits, n)
    places, bit = torch.arange(32, dtype=torch.int32), torch.arange(bits, dtype=torch.uint8)
    out = torch.empty(words.shape[0], n, dtype=torch.uint8)
    step = max(1, _SLAB // n)
    for a in range(0, len(words), step):
        stream = ((words[a : a + step].unsqueeze(-1) >> places) & 1).to(torch.uint8).view(-1, n, bits)
        out[a : a + step] = (stream << bit).sum(-1, dtype=torch.uint8)
    return out


def _settings(scheme: LayerSpec) -> dict[str, Any]:
    group_size = -1 if scheme.group_size == CHANNEL else scheme.group_size
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _bare(pattern: str) -> str:
    return pattern.removeprefix("-:").removeprefix("+:")


def _exactly(sign: str, module: str) -> str:
    return f"{sign}^{re.escape(module)}$"


def _parse_scheme(given: Mapping[str, Any]) -> LayerSpec:
    size = given.get("group_size", -1)
    bits = given.get("bits")
    if not isinstance(size, int) or not isinstance(bits, int) or size == 0:
        raise QkitError(f"the GPTQ config has bits {bits!r} and group_size {size!r}", "both must be integers, not 0")
    # Without "sym" the zero points that are always stored are read and believed.
    return integer(bits, CHANNEL if size == -1 else size, bool(given.get("sym", False)), "F16")
