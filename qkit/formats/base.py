"""What every on-disk format offers. Formats are pure: local names in and out, inputs never modified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import QkitError
from ..spec import Keep, LayerSpec
from ..spec.dtypes import FLOATS, TensorMeta, dtype_name
from ..untrusted import SlowPattern, compiled, matches

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..sources.types import Source


class Format(Protocol):
    """One on-disk format. `name` is what the user types; local names are suffixes such as "weight_packed".

    Formats are subclasses, which gives them what most have in common.
    read_only       folders are read, and not written
    kinds           of weights that it holds (`LayerSpec.kind`)
    holds_head      clients load a quantized output head from it
    container       the kind of files that hold the tensors: a key of `conversion.containers.CONTAINERS`
    kv_caches       what it can say that keys and values are rounded to in a client's cache
    default_scheme  what a user gets who names none
    calibrated      the method of a user who names none, below 8 bits
    joint           between a module's place and a local name
    whole_experts   an expert's gate and up are one matrix
    by_rows         `pack` takes some rows of a weight, a multiple of 256 before the last, and `of`: how many there are
                    in all. What it gives then is a part, along one dimension, of what it gives of all, or the same
    rows_follow     that dimension is the first, in the first of the tensors
    """

    read_only: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("int",)
    holds_head: ClassVar[bool] = False
    kv_caches: ClassVar[tuple[str, ...]] = ()
    container: ClassVar[str] = "safetensors"
    default_scheme: ClassVar[str] = "w4a16"
    calibrated: ClassVar[str] = "gptq"
    joint: ClassVar[str] = "."
    whole_experts: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    rows_follow: ClassVar[bool] = True

    @property
    def name(self) -> str: ...

    @property
    def quant_method(self) -> str | None:
        """What `quant_method` in a config.json says of folders in this format; None: they are not quantized."""
        ...

    def bound(self, source: Source) -> Format:
        """The format for this one checkpoint. Raises QkitError where it has no place in the format."""
        return self

    def view(self, source: Source) -> Source:
        """The checkpoint with the tensors and values that the format's files hold."""
        return source

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
        """The format's last word: what it makes of the recipe's choice for each tensor, and what to say of it.

        importance: whether the method weighs errors by what the calibration text does; head: the option --head."""
        return choices, []

    def place(self, name: str) -> str:
        """What a module, or a tensor that is not quantized, is called in this format's files. Those that get one name
        are stacked there along a new first dimension, in the order of the source: experts, where a file has them as
        one tensor."""
        return name

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        """`scheme` with what the format dictates filled in (scale dtype, least zero point).

        Raises QkitError, with the remedy, where the format cannot hold it."""
        ...

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        """Why a [out, in] weight cannot be stored in this format, or None (e.g. GPTQ: in and out % 32)."""
        ...

    def once(self, local: str) -> bool:
        """Whether a matrix has one of this output, whatever its rows, that says how many there are."""
        return False

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        """Local name -> dtype and shape of every tensor `pack` will return, in writing order."""
        ...

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        """The tensors on disk for one weight, keyed by local name. scheme: how it is to be stored, where the format can
        store one weight in more than one way; of: see `by_rows`."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        """The inverse of `pack`, exactly; raises QkitError where the tensors disagree with each other or with the
        scheme. rows: how many rows of a weight the tensors are (see `by_rows`), where they are not all."""
        ...

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        """[out, in] of a quantized weight in `source`, of whose tensors only small ones are read. Most formats store
        it as the shape of `weight`."""
        return matrix_shape(source, f"{module}.weight")

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The `quantization_config`. schemes: module name -> LayerSpec for each quantized module; ignored: names
        of the linear modules left alone; options: method facts (damp_percent, desc_act, ...), and kv_cache: which of
        `kv_caches`, or None."""
        ...

    def extra_files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        """Files that a folder needs beside config.json: name -> bytes."""
        return {}

    def parse(self, quantization_config: Mapping[str, Any]) -> FormatReader:
        """A reader for a folder in this format: see `formats.reader`."""
        ...


class ReadOnly(Format):
    """A format whose folders are read, and not written."""

    read_only: ClassVar[bool] = True

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        raise QkitError(f"format {self.name} is read, not written", "use compressed-tensors or gptq")

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        return f"format {self.name} is read, not written"

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        raise ValueError(f"format {self.name} is read, not written")

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        raise ValueError(f"format {self.name} is read, not written")

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        raise ValueError(f"format {self.name} is read, not written")


class FormatReader(Protocol):
    """What the config.json of one folder says of its quantized modules. Made by `formats.reader`.

    format    the Format that unpacks them
    markers   local names of which one means that a module is quantized ("weight_packed")
    scale     local name of the scale
    optional  local names that a module may or may not have, beside those of `required`
    One that may round the KV cache also has `kv_cache`: see `formats.kv_cache`.
    """

    @property
    def format(self) -> Format: ...
    @property
    def markers(self) -> tuple[str, ...]: ...
    @property
    def scale(self) -> str: ...
    @property
    def optional(self) -> tuple[str, ...]: ...

    def scheme(self, module: str) -> LayerSpec | None:
        """How the config says `module` is stored; None: not quantized. The config does not say the scale's
        dtype: `quantized_modules` fills it in."""
        ...

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        """Local names of the tensors that a quantized module must have, the one of the codes first."""
        ...


def quantized_modules(reader: FormatReader, source: Source) -> dict[str, LayerSpec]:
    """Module name -> LayerSpec for every module that `source` stores quantized. Reads no tensor.

    The tensors decide which modules are quantized; raises QkitError where the config disagrees, or where a
    module lacks a tensor."""
    schemes: dict[str, LayerSpec] = {}
    for name in source.names():
        suffix = next((f".{local}" for local in reader.markers if name.endswith(f".{local}")), None)
        if suffix is None or (module := name.removesuffix(suffix)) in schemes:
            continue
        scheme = reader.scheme(module)
        if scheme is None:
            raise QkitError(f"{name!r} is stored quantized, but the config says that module is not")
        for local in reader.required(scheme):
            if not _has(source, f"{module}.{local}"):
                raise QkitError(f"the checkpoint lacks tensor '{module}.{local}'", "is it complete?")
        scale = source.meta(f"{module}.{reader.scale}").dtype
        schemes[module] = scheme.stored_with(scale)
        if schemes[module].kind != scheme.kind:  # MXFP4 and NVFP4 differ in the type of their scales
            raise QkitError(f"'{module}.{reader.scale}' is {scale}, which no scale of {scheme.kind} is")
    return schemes


def local_names(reader: FormatReader, source: Source, module: str, scheme: LayerSpec) -> tuple[str, ...]:
    """Local names of the tensors that hold one quantized weight in `source`."""
    extra = (local for local in reader.optional if _has(source, f"{module}.{local}"))
    return (*reader.required(scheme), *extra)


def read_weight(reader: FormatReader, source: Source, module: str, scheme: LayerSpec) -> Weight:
    """One quantized weight of `source`; raises QkitError naming the module and what is wrong with it."""
    names = local_names(reader, source, module, scheme)
    try:
        return reader.format.unpack({local: source.read(f"{module}.{local}") for local in names}, scheme)
    except QkitError as error:
        raise QkitError(f"{module}: {error.message}", error.hint) from error


def check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorMeta]) -> None:
    """Raises QkitError unless each tensor has the dtype and shape `expected`; floats may be of any kind."""
    for local, meta in expected.items():
        tensor = tensors.get(local)
        if tensor is None:
            raise QkitError(f"tensor {local!r} is missing")
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        if shape != meta.shape or (dtype != meta.dtype and not {dtype, meta.dtype} <= set(FLOATS)):
            raise QkitError(
                f"tensor {local!r} is {dtype} {list(shape)}, its config says {meta.dtype} {list(meta.shape)}"
            )


def matrix_shape(source: Source, name: str) -> tuple[int, int]:
    """[rows, columns] of a tensor; raises QkitError for one that is no matrix."""
    shape = source.meta(name).shape
    if len(shape) != 2:
        raise QkitError(f"tensor {name!r} has shape {list(shape)}, not two dimensions", "the checkpoint is damaged")
    return shape[0], shape[1]


def as_object(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object of a config, {} for null; raises QkitError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise QkitError(f"{what} in the quantization config is not an object: {value!r}")
    return value


def as_names(value: Any, what: str) -> tuple[str, ...]:
    """A JSON list of strings, () for null; raises QkitError for anything else."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise QkitError(f"{what} in the quantization config is not a list of names: {value!r}")
    return tuple(value)


def check_pattern(pattern: str) -> None:
    """Raises QkitError for what is not a regular expression."""
    try:
        compiled(pattern)
    except ValueError as error:
        raise QkitError(f"bad pattern in the quantization config: {pattern!r}: {error}") from error


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a pattern of the config, which `check_pattern` has seen, matches the begin of a module's name. Raises
    QkitError for one that takes too long."""
    try:
        return matches(pattern, module)
    except SlowPattern as error:
        raise QkitError(
            f"quantization config: {error}", "the checkpoint's config is damaged, or made to stall"
        ) from None


def column_order(g_idx: torch.Tensor, scheme: LayerSpec) -> torch.Tensor | None:
    """Inputs in the order of their groups, int64 [in], where g_idx [in] says that input i is of group g_idx[i]; None
    where input i is of group i // group_size. Raises QkitError unless the groups are of one size."""
    import torch

    given = g_idx.to(torch.int64).cpu()
    n, size = given.numel(), scheme.group_size or given.numel()
    expected = torch.arange(n) // size
    if torch.equal(given, expected):
        return None
    if (
        int(given.min()) < 0
        or int(given.max()) >= n // size
        or not torch.equal(torch.bincount(given, minlength=n // size), torch.full((n // size,), size))
    ):
        raise QkitError(f"its g_idx does not divide {n} inputs into groups of {size}", "the checkpoint is damaged")
    return torch.argsort(given, stable=True)


def in_order(packed: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Packed codes [out, words] with their columns sorted into `order`."""
    from ..kernels import pack, unpack

    return pack(unpack(packed, bits, order.numel())[:, order].contiguous(), bits)


def _has(source: Source, name: str) -> bool:
    try:
        source.meta(name)
    except KeyError:
        return False
    return True
