"""A PEFT LoRA adapter merged into its base model, one tensor at a time, as the tensors are read.

W + scale * B @ A (LoRA, arXiv:2106.09685; scale alpha / r, or alpha / sqrt(r) for rsLoRA, arXiv:2312.03732), for
DoRA rescaled to the trained magnitude (arXiv:2402.09353, section 4). In float32, rounded once to W's dtype.
Names and config as PEFT's `save_pretrained` writes them (peft/utils/save_and_load.py, tuners/lora/config.py).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..spec.dtypes import FLOATS, TensorMeta, torch_dtype
from ..storage.files import first_few, natural_key, read_json
from ..storage.local import LocalStore
from ..storage.safetensors import SafetensorsFile
from ..storage.store import Store, hash_file
from ..untrusted import SlowPattern, compiled, matches
from .folder import PICKLE_HINT
from .types import ROWS, Once, Rows, Source

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MERGE_HINT = "merge it with PEFT (model.merge_and_unload(), then save_pretrained) and convert the result"
_MOST_ALPHA = 1e30  # NaN is not below it
_WRONG_BASE = "is this the adapter's base model?"

# Options that change what the adapter computes in ways a plain merge does not follow.
_UNSUPPORTED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_bdlora", "use_qalora", "megatron_config",
)  # fmt: skip
# Initializations that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) train against
# a base that was changed first, and adding their product to the original would be wrong.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# The kinds of adapter tensor, by the end of their names.
_PARTS = {
    ".lora_A.weight": "a", ".lora_embedding_A": "a", ".lora_B.weight": "b", ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude", ".lora_B.bias": "bias",
}  # fmt: skip
_CONV1D_MODELS = ("gpt2", "openai-gpt")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.|$)")
# Where a module's name in the running model differs from the one on disk.
_PREFIXES = (("", "model."), ("model.", ""), ("model.language_model.", "language_model.model."))


@dataclass
class _Change:
    """What happens to one tensor of the base. Strings are names in the adapter's file."""

    replace: str | None = None  # a full copy (modules_to_save, trained biases)
    a: str | None = None  # [rank, in]
    b: str | None = None  # [out, rank]
    magnitude: str | None = None  # DoRA: [out] values
    bias: str | None = None  # added to a bias, times scale
    scale: float = 1.0
    transposed: bool = False  # the tensor is [in, out]: Conv1D, or an embedding (linear over one-hot vectors)
    keys: list[str] = field(default_factory=list)


def merge(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    transposed: bool,
    magnitude: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """weight + scale * b @ a in float32 (float64 for a float64 weight), rounded once to `dtype`.

    weight [out, in], or [in, out] if transposed; it is overwritten where it has `dtype` already. a [rank, in],
    b [out, rank], magnitude: out values, or None. In blocks of `ROWS` rows: an embedding in float32 would double the
    peak, and parts of a weight that begin with a block come out as in the whole.
    """
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = (a.T, b.T) if transposed else (b, a)
    left, right = left.to(wide).contiguous(), right.to(wide).contiguous()
    rows, columns = weight.shape
    blocks = [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]

    def summed(block: slice) -> torch.Tensor:
        return torch.addmm(weight[block].to(wide), left[block], right, alpha=scale)

    factor = None
    if magnitude is not None:
        magnitude = magnitude.to(wide).view(-1)
        if transposed:  # the norm runs over the rows: one pass to collect it
            squares = sum((summed(block).square().sum(dim=0) for block in blocks), torch.zeros(columns, dtype=wide))
            factor = magnitude / squares.sqrt()
    out = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    for block in blocks:
        merged = summed(block)
        if factor is not None:
            merged *= factor
        elif magnitude is not None:
            merged *= (magnitude[block] / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        out[block] = merged
    return out


def _by_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first entry of rank_pattern or alpha_pattern whose key matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        try:
            if matches(rf"(.*\.)?({key})$", module):
                return value
        except SlowPattern as error:
            raise QkitError(f"rank_pattern or alpha_pattern: {error}", "the adapter's config is damaged") from None
    return default


def _check_config(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise QkitError(f"{folder} is a {config.get('peft_type')!r} adapter; qkit merges LORA only", _MERGE_HINT)
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise QkitError(f"{folder} uses {', '.join(used)}, which qkit does not merge", _MERGE_HINT)
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise QkitError(
            f"{folder} was trained on a base that its initialization ({init}) had changed",
            "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) first",
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(table, dict):
            raise QkitError(f"{folder}: {name} is not a table")
        for key in table:
            try:
                compiled(rf"(.*\.)?({key})$")
            except ValueError as error:
                raise QkitError(f"{folder}: {name} holds the invalid pattern {key!r}: {error}") from error
    if any(type(rank) is not int or rank < 1 for rank in (config.get("r"), *ranks.values())):
        raise QkitError(f"{folder}: r or rank_pattern in {CONFIG} is not a positive whole number")
    if any(
        type(a) not in (int, float) or not abs(a) < _MOST_ALPHA for a in (config.get("lora_alpha"), *alphas.values())
    ):
        raise QkitError(f"{folder}: lora_alpha or alpha_pattern in {CONFIG} is not a number")


class LoraSource:
    """`base` with the adapter in the folder `adapter` merged in; config and sidecars are the base's.

    Everything is matched up when it is opened: raises QkitError, before any work, for targets the base lacks,
    shapes that do not fit, and adapters that a merge cannot express.
    """

    def __init__(self, base: Source, adapter: str | Path):
        self._folder = folder = Path(adapter)
        if not os.path.isdir(folder):
            raise QkitError(f"there is no adapter folder {folder}", f"name a folder with {CONFIG} and {WEIGHTS}")
        if not os.path.exists(folder / CONFIG):
            raise QkitError(f"{folder} has no {CONFIG}", "name the folder that PEFT's save_pretrained wrote")
        self._store = LocalStore(folder)
        self._settings = read_json(self._store, CONFIG)
        _check_config(self._settings, folder)
        if not os.path.exists(folder / WEIGHTS) and os.path.exists(folder / "adapter_model.bin"):
            raise QkitError(f"{folder} holds its weights as a pickle file", PICKLE_HINT)
        self._base = base
        self._base_names = set(base.names())
        self._file = SafetensorsFile(self._store.open(WEIGHTS))
        self._changes = self._match()
        self._check_tied()
        for name, change in self._changes.items():
            self._check(name, change)
        self.label = f"{base.label} + {folder}"
        self.base_model = base.base_model
        self.config = base.config
        self.sidecars = base.sidecars
        self.stored = base.stored
        self.folder: Path | Store | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        return self._base.metadata

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the adapter's config, and its weights whole: they are small."""
        parts = [self._base.fingerprint, *(hash_file(self._store, name).sha256 for name in (CONFIG, WEIGHTS))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def names(self) -> list[str]:
        """Tensor names in natural order: the base's."""
        return self._base.names()

    def meta(self, name: str) -> TensorMeta:
        """dtype and shape, those of the base; KeyError for an unknown name."""
        return self._base.meta(name)

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor, in memory of its own and in the base's dtype; thread-safe."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name)
        dtype = torch_dtype(self._base.meta(name).dtype)
        weight = self._base.read(name) if change.replace is None else self._file.read(change.replace)
        if change.bias is not None:
            return (weight.float() + change.scale * self._file.read(change.bias).float()).to(dtype)
        if change.a is None or change.b is None:
            return weight.to(dtype)
        magnitude = None if change.magnitude is None else self._file.read(change.magnitude)
        a, b = self._file.read(change.a), self._file.read(change.b)
        return merge(weight, a, b, change.scale, change.transposed, magnitude, dtype)

    def read_part(self, name: str, index: int) -> torch.Tensor:
        return self.read(name)[index].clone() if name in self._changes else self._base.read_part(name, index)

    def rows(self, name: str) -> Rows | None:
        change, base = self._changes.get(name), self._base.rows(name)
        if change is None:
            return base
        if change.bias is not None or change.transposed:
            return None
        dtype = torch_dtype(self._base.meta(name).dtype)
        if change.replace is not None:
            base = partial(self._file.rows, change.replace)
        if change.a is None or change.b is None or base is None:
            return None if base is None else lambda start, stop: base(start, stop).to(dtype)
        keys = (change.a, change.b, change.magnitude)
        factors = Once(lambda: [None if key is None else self._file.read(key) for key in keys])

        def merged(start: int, stop: int) -> torch.Tensor:
            a, b, magnitude = factors()
            assert a is not None and b is not None
            part = None if magnitude is None else magnitude.view(-1)[start:stop]
            return merge(base(start, stop), a, b[start:stop], change.scale, False, part, dtype)

        return merged

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._file.meta(key).shape

    def _resolve(self, name: str) -> str:
        """The base's name for the tensor the adapter calls `name`; the same name where there is none."""
        for running, stored in (("", ""), *_PREFIXES):
            candidate = stored + name.removeprefix(running)
            if name.startswith(running) and candidate in self._base_names:
                return candidate
        return name

    def _match(self) -> dict[str, _Change]:
        """The base's tensor names -> what the adapter's tensors do to them."""
        changes: dict[str, _Change] = {}
        for key in sorted(self._file.names(), key=natural_key):
            name = key.removeprefix("base_model.model.")
            suffix = next((end for end in _PARTS if name.endswith(end)), None)
            if suffix is None and ".lora_" in name:
                raise QkitError(f"{self._folder}: {key} is of a kind that qkit does not merge", _MERGE_HINT)
            part = _PARTS[suffix] if suffix else "replace"
            module = _WRAPPERS.sub("", name.removesuffix(suffix or ""))
            # A full copy has the name of its tensor; the others have the name of their module.
            ending = "" if suffix is None else ".bias" if part == "bias" else ".weight"
            change = changes.setdefault(self._resolve(module + ending), _Change())
            if getattr(change, part) is not None:
                raise QkitError(f"{self._folder}: {getattr(change, part)} and {key} mean the same tensor")
            setattr(change, part, key)
            change.keys.append(key)
            if suffix is None:
                continue
            rank = _by_module(self._settings.get("rank_pattern"), module, self._settings["r"])
            alpha = _by_module(self._settings.get("alpha_pattern"), module, self._settings["lora_alpha"])
            change.scale = alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
            change.transposed |= "lora_embedding" in suffix
            if part == "a" and self._shape(key)[:1] != (rank,):
                raise QkitError(f"{self._folder}: {key} is {list(self._shape(key))}, but {CONFIG} says rank {rank}")
        return changes

    def _check(self, name: str, change: _Change) -> None:
        """Raise QkitError unless `change` fits the base's tensor `name`."""
        keys = first_few(change.keys)
        if name not in self._base_names:
            trained_on = self._settings.get("base_model_name_or_path")
            raise QkitError(
                f"{self._folder} changes {name} ({keys}), which {self._base.label} does not have",
                f"{_WRONG_BASE} It was trained on {trained_on}" if trained_on else _WRONG_BASE,
            )
        meta = self._base.meta(name)
        if meta.dtype not in FLOATS:
            raise QkitError(f"{name} is stored as {meta.dtype}; an adapter merges into float weights only",
                            "merge it into the model as it was before quantization")  # fmt: skip
        for key in change.keys:
            if self._file.meta(key).dtype not in FLOATS:
                raise QkitError(f"{self._folder}: {key} is stored as {self._file.meta(key).dtype}, not as floats")
        for copy in (change.replace, change.bias):
            if copy is not None and self._shape(copy) != meta.shape:
                raise QkitError(f"{self._folder}: {copy} is {list(self._shape(copy))}, {name} is {list(meta.shape)}",
                                f"{_WRONG_BASE} If its vocabulary was resized: {_MERGE_HINT}")  # fmt: skip
        if change.a is change.b is change.magnitude is None:
            return
        if change.a is None or change.b is None:
            raise QkitError(f"{self._folder}: {keys} has only one of lora_A and lora_B", "fetch the adapter again")
        if bool(self._settings.get("use_dora")) != (change.magnitude is not None):
            raise QkitError(f"{self._folder}: use_dora in {CONFIG} and the tensors of {name} contradict each other")
        a, b = self._shape(change.a), self._shape(change.b)
        if len(meta.shape) != 2 or len(a) != 2 or len(b) != 2:
            raise QkitError(f"{self._folder}: {keys}: only two-dimensional weights are merged", _MERGE_HINT)
        if meta.shape == (a[1], b[0]):
            # PEFT's flag is one for all layers, and wrong for some where a model has both Conv1D ([in, out]) and
            # Linear. Where the shape does not tell, the model's family does.
            conv1d = self._settings.get("fan_in_fan_out") or self._base.config.get("model_type") in _CONV1D_MODELS
            square = a[1] == b[0]
            change.transposed |= not square or (bool(conv1d) and not name.endswith("lm_head.weight"))
        if a[0] != b[1] or meta.shape != ((a[1], b[0]) if change.transposed else (b[0], a[1])):
            raise QkitError(f"{self._folder}: {keys} ({list(a)}, {list(b)}) does not fit {name} {list(meta.shape)}",
                            _WRONG_BASE)  # fmt: skip
        if change.magnitude is not None and math.prod(self._shape(change.magnitude)) != b[0]:
            raise QkitError(f"{self._folder}: {change.magnitude} should hold {b[0]} values", _WRONG_BASE)

    def _ties(self, head: str) -> bool:
        """Whether the base shares its input and output embedding (config.json, else: it stores no output one)."""
        for config in (self._base.config, self._base.config.get("text_config")):
            if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
                return config["tie_word_embeddings"]
        return head not in self._base_names

    def _check_tied(self) -> None:
        """Refuse to change one of two modules that share a tensor: the merge would change both.

        Unless the adapter was trained that way, or holds full copies that agree (PEFT saves resized or listed
        embeddings whether or not they were trained)."""
        names = {*self._base_names, *self._changes}
        embeds = [n for n in names if re.search(r"(^|\.)(embed_tokens|wte)\.weight$", n)]
        heads = [n for n in names if re.search(r"(^|\.)lm_head\.weight$", n)] or ["lm_head.weight"]
        if len(embeds) != 1 or len(heads) != 1 or not self._ties(heads[0]):
            return
        embed, head = self._changes.get(embeds[0]), self._changes.get(heads[0])
        if (embed is head is None) or (head is None and self._settings.get("ensure_weight_tying")):
            return
        if all(change is None or change.keys == [change.replace] for change in (embed, head)):
            import torch

            first, second = (
                self._file.read(change.keys[0]) if change else self._base.read(embeds[0]) for change in (embed, head)
            )
            if first.shape == second.shape and torch.equal(first.float(), second.float()):
                if heads[0] not in self._base_names:
                    self._changes.pop(heads[0], None)
                return
        raise QkitError(
            f"{self._folder} changes the {'input' if embed else 'output'} embedding, which {self._base.label} shares "
            "between input and output",
            "untie the base first: in transformers give lm_head a copy of the weight, set "
            "config.tie_word_embeddings = False, and save_pretrained",
        )
