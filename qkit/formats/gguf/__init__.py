"""GGUF: one file that llama.cpp and what is built on it load, with the tokenizer and the chat template inside.

Reference: ggml/docs/gguf.md, ggml-common.h (blocks), llama.cpp's src/llama-quant.cpp (which tensor gets which type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ...spec import Keep, LayerSpec, ggml
from ...spec.dtypes import TensorMeta, torch_dtype
from ...spec.ggml import GGML
from ...storage.gguf import Typed
from ..base import Format, FormatReader
from . import mixes

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight
    from ...sources.types import Source
    from .view import GgufView

_QUANTIZED_TOO = ("embedding", "output head")  # what llama.cpp quantizes beside the decoder blocks
_HEADS = {"8bit": "Q8_0", "4bit": "Q4_K"}  # of the option --head, for the embedding too
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True)
class Gguf(Format):
    """A module has one tensor, its blocks. view: the model that is written; None until `bound`."""

    name: str = "gguf"
    quant_method: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("ggml",)
    container: ClassVar[str] = "gguf"
    default_scheme: ClassVar[str] = "q4_k_m"
    calibrated: ClassVar[str] = "imatrix"
    by_rows: ClassVar[bool] = True
    model: GgufView | None = None

    def bound(self, source: Source) -> Gguf:
        from .view import GgufView

        return Gguf(model=GgufView(source))

    @property
    def bound_model(self) -> GgufView:
        assert self.model is not None, "the format is bound to a source first"
        return self.model

    def view(self, source: Source) -> Source:
        return self.bound_model

    def place(self, name: str) -> str:
        places = self.bound_model.places
        if name in places:
            return places[name]
        return places[f"{name}.weight"].removesuffix(".weight")

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        return scheme

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        kind = GGML.get(scheme.grid.block)
        if kind and shape[1] % kind.block_size:
            return f"{kind.name} has blocks of {kind.block_size}, which do not divide its {shape[1]} inputs"
        return None

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[dict[str, LayerSpec | Keep], list[str]]:
        """What a mix means for each tensor, the embedding and the head included."""
        model = self.bound_model
        config = model.model.config
        facts = mixes.Facts(
            model.model.layers,
            int(config["num_experts"]) if model.model.arch.experts else 0,
            model.model.heads_per_kv,
            importance,
        )
        made = [c.grid.block for c in choices.values() if isinstance(c, LayerSpec)]
        most = max(made, key=made.count) if made else None
        chosen: dict[str, LayerSpec | Keep] = {}
        fell: dict[tuple[str, str], int] = {}
        for name, choice in choices.items():
            mix = choice.grid.block if isinstance(choice, LayerSpec) else most
            outside = isinstance(choice, Keep) and choice.reason in _QUANTIZED_TOO and name in model.places
            if mix is None or (isinstance(choice, Keep) and not outside):
                chosen[name] = choice
                continue
            columns = model.meta(name).shape[1]
            if outside and head == "keep":
                chosen[name] = choice
                continue
            wanted = mixes.wanted(mix, model.places[name], columns, facts, model.tied)
            if outside and head is not None:
                wanted = _HEADS[head]
            block = mixes.fallback(wanted, columns)
            if block != wanted:
                fell[wanted, block] = fell.get((wanted, block), 0) + 1
            chosen[name] = ggml(block)
        notes = [
            f"{n} weights have rows that 256 does not divide: {block} instead of {wanted}, as in llama.cpp"
            for (wanted, block), n in fell.items()
        ]
        window = model.model.ignored_window
        if window:
            notes.append(f"llama.cpp knows no sliding window here: after {window} tokens its results are others")
        if model.left_out:
            notes.append(f"{len(model.left_out)} tensors beside the text model are left out (vision or audio towers)")
        return chosen, notes

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        kind = GGML[scheme.grid.block]
        meta = TensorMeta(kind.plain, shape) if kind.plain else TensorMeta("U8", (shape[0], kind.row_bytes(shape[1])))
        return {"weight": meta}

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        plain = GGML[weight.spec.grid.block].plain
        return {"weight": weight.packed.view(torch_dtype(plain)) if plain else weight.packed}

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        import torch

        from ...kernels.weight import Blocks

        return Blocks.of(tensors["weight"].contiguous().view(torch.uint8), scheme.grid.block)

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Empty: what is in the file says it all."""
        return {}

    def parse(self, quantization_config: Mapping[str, Any]) -> FormatReader:
        _refuse()

    def header(self, name: str, mix: str | None) -> dict[str, str | Typed]:
        """The file's metadata. name: what the model is called; mix: None where nothing is quantized."""
        from .metadata import hyperparameters

        view = self.bound_model
        found: dict[str, str | Typed] = {
            "general.architecture": view.model.name,
            "general.type": "model",
            "general.name": name,
            "general.alignment": Typed("u32", 32),
        }
        for key in ("license", "license_name", "license_link"):
            value = view.metadata.get(key)
            if isinstance(value, str) and value:
                found[f"general.{key.replace('_', '.')}"] = value
        if "/" in view.base_model:
            found["general.source.huggingface.repository"] = view.base_model
        found |= hyperparameters(view.model)
        found[f"{view.model.name}.vocab_size"] = Typed("u32", view.embedded)
        if mix is not None:
            found["general.file_type"] = Typed("u32", mixes.MIXES[mix][1])
            found["general.quantization_version"] = Typed("u32", _QUANTIZATION_VERSION)
        return {**found, **view.vocabulary.metadata(view.embedded)}


def _refuse() -> NoReturn:
    raise ValueError("GGUF files are read by qkit.sources")
