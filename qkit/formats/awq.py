"""AWQ folders, version "gemm": 4 bits, with zero points.

Reference: AutoAWQ, awq/modules/linear/gemm.py and awq/models/_config.py. w = (q - z) * s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..spec import CHANNEL, Keep, LayerSpec, integer
from ..spec.dtypes import TensorMeta
from .base import Format, as_names, check_tensors, matrix_shape

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..sources.types import Source

# Nibble i of word j is output 8 j + _ORDER[i]; _BACK is the inverse.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_GROUP_SIZES = (32, 64, 128, CHANNEL)
_SLAB = 1 << 18  # codes at a time


@dataclass(frozen=True)
class AWQ(Format):
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8], both packed along out; scales F16 [groups, out].

    Zero points are always stored; those of a symmetric grid are 8."""

    name: str = "awq"
    quant_method: ClassVar[str | None] = "awq"
    default_scheme: ClassVar[str] = "w4a16-asym"
    by_rows: ClassVar[bool] = True
    rows_follow: ClassVar[bool] = False

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        if scheme.bits != 4:
            raise QkitError(f"AWQ has no {scheme.bits}-bit weights", "use scheme w4a16-asym or w4a16, or format gptq")
        if scheme.group_size not in _GROUP_SIZES:
            raise QkitError(f"AWQ has no group size {scheme.group_size}", "use 32, 64, 128 or 'channel'")
        return scheme.stored_with("F16", min_zero=0)

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        out, in_ = shape
        if out % 8:
            return f"AWQ needs outputs divisible by 8, not {out}"
        if scheme.group_size != CHANNEL and in_ % scheme.group_size:
            return f"group size {scheme.group_size} does not divide its {in_} inputs"
        return None

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
        sizes = sorted({choice.group_size for choice in choices.values() if isinstance(choice, LayerSpec)})
        if len(sizes) > 1:
            raise QkitError(
                f"AWQ has one group size for the whole model, not {', '.join(map(str, sizes))}",
                "use one --group-size, or format gptq, which can mix them",
            )
        return choices, []

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        out, in_ = shape
        groups = scheme.groups(in_)
        return {
            "qweight": TensorMeta("I32", (in_, out // 8)),
            "qzeros": TensorMeta("I32", (groups, out // 8)),
            "scales": TensorMeta("F16", (groups, out)),
        }

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        """Raises ValueError for what the format cannot hold (`scheme_for` and `check` come first)."""
        import torch

        from ..kernels.codes import codes_of

        reason = self.check((weight.out_features, weight.in_features), weight.spec)
        if reason or weight.bits != 4 or weight.scale.dtype != torch.float16:
            raise ValueError(reason or f"AWQ stores 4 bits with float16 scales, not {weight.spec.describe()}")
        zero = weight.zero
        if zero is None:
            zero = torch.full(weight.scale.shape, 8, dtype=torch.uint8)
        return {
            "qweight": _words(codes_of(weight).t()),
            "qzeros": _words(zero.t()),
            "scales": weight.scale.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        from ..kernels import pack
        from ..kernels.weight import Weight

        qweight = tensors["qweight"]
        if qweight.dim() != 2:
            raise QkitError(f"qweight has shape {list(qweight.shape)}, not two dimensions")
        in_, out = qweight.shape[0], qweight.shape[1] * 8
        reason = self.check((out, in_), scheme)
        if reason:
            raise QkitError(reason)
        check_tensors(tensors, self.out_metas((out, in_), scheme))
        zero: torch.Tensor | None = _codes(tensors["qzeros"]).t().contiguous()
        if scheme.symmetric and zero is not None:
            if bool((zero != scheme.mid).any()):
                found = f"{int(zero.min())} to {int(zero.max())}"
                raise QkitError(f"the config says that there are no zero points, but they are {found}")
            zero = None
        return Weight(pack(_codes(qweight).t().contiguous(), 4), tensors["scales"].t().contiguous(), zero, 4, in_)

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        in_, words = matrix_shape(source, f"{module}.qweight")
        return words * 8, in_

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Readers leave out every module whose name holds one of modules_to_not_convert."""
        size = next(iter(schemes.values())).group_size  # of all: see `choose`
        kept = [module for module in ignored if module != "lm_head"]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if size == CHANNEL else size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
        }

    def parse(self, quantization_config: Mapping[str, Any]) -> AWQReader:
        given = quantization_config
        version = str(given.get("version", given.get("format", "gemm"))).lower()
        if version != "gemm":
            raise QkitError(f"AWQ version {version!r} is not supported", "supported: gemm")
        bits = given.get("bits", given.get("w_bit", 4))
        size = given.get("group_size", given.get("q_group_size", 128))
        if bits != 4 or not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise QkitError(f"the AWQ config has bits {bits!r} and group_size {size!r}", "supported: 4 bits in groups")
        kept = as_names(given.get("modules_to_not_convert"), "modules_to_not_convert")
        return AWQReader(_spec(size), kept, self)


def _spec(size: int) -> LayerSpec:
    # Whatever "zero_point" says: zero points are stored, and are believed.
    return integer(4, CHANNEL if size == -1 else size, symmetric=False, scale_dtype="F16")


@dataclass(frozen=True)
class AWQReader:
    """The tensors say which modules are quantized; the config must not say otherwise of them."""

    spec: LayerSpec
    kept: tuple[str, ...]
    format: AWQ = AWQ()
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    scale: ClassVar[str] = "scales"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec | None:
        return None if module in self.kept else self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, out] -> int32 [rows, out / 8]. Some rows at a time: bounds what is held beside the result."""
    import torch

    from ..kernels import pack

    rows, n = codes.shape
    out = torch.empty(rows, n // 8, dtype=torch.int32)
    step = max(1, _SLAB // n)
    for a in range(0, rows, step):
        part = codes[a : a + step]
        ordered = part.reshape(len(part), -1, 8)[:, :, list(_ORDER)]
        out[a : a + step] = pack(ordered.reshape(part.shape).contiguous(), 4)
    return out


def _codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, out / 8] -> uint8 [rows, out]."""
    from ..kernels import unpack

    codes = unpack(words.contiguous(), 4, words.shape[1] * 8)
    return codes.view(codes.shape[0], -1, 8)[:, :, list(_BACK)].reshape(codes.shape)
