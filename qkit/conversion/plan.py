"""Everything decided before any tensor is read: tasks, files, predictions, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..hardware.detect import resolve
from ..models.client_names import ClientNames, client_names
from ..models.client_names import needed as names_needed
from ..models.config import model_dtype
from ..models.families import module_of
from ..sources.sliced import sliced
from ..spec import CHANNEL, Keep, LayerSpec, Recipe
from ..spec.dtypes import TensorMeta
from ..storage.files import natural_key
from . import experts, fitting
from .choice import check_recipe, check_source, choose_method, of_what_stays
from .containers import CONTAINERS
from .disk import room
from .executor import check_spread
from .head import choose_head, with_head
from .kv_cache import CacheScales, with_cache
from .options import AS_STORED, Options
from .output import Out, is_remote, transfers
from .predict import Prediction, predict
from .recipe import make_recipe, settle
from .stored import expand, notes_of, stored_recipe
from .tasks import SHARD_BYTES, Shard, Task, check_collisions, schemes_of

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..methods import Method
    from ..sources.types import Source, Stored


@dataclass(frozen=True)
class Plan:
    """The whole conversion, decided. Sizes in bytes.

    original what is read: the source, with its weights as values and a head of its own where the plan needs that
    disk_needed, disk_free: where the result goes; None where nothing counts what is free, in a bucket
    fmt      bound to it; view: it with the tensors that the format's files hold
    name     what the result is called, which no path decides
    clients  what transformers calls the modules, where that may be something else than the files do
    cache    what holds the scales of the KV cache, where they are to be calibrated
    """

    source: str
    out: Out
    options: Options
    original: Source
    fmt: Format
    view: Source
    name: str
    method: Method
    recipe: Recipe
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]
    device: str
    predicted: Prediction
    disk_needed: int
    disk_free: int | None
    stored: Stored
    clients: ClientNames | None = None
    cache: CacheScales | None = None

    @property
    def kv_cache(self) -> str | None:
        """What clients round keys and values to: "fp8", or nothing."""
        return self.fmt.kv_caches[0] if self.options.kv_cache == AS_STORED else self.options.kv_cache

    @property
    def calibrates(self) -> bool:
        """Whether the model runs on the calibration text."""
        return self.method.needs is not None or self.cache is not None

    @property
    def over_network(self) -> bool:
        """Whether the source is read, or the result written, over a network."""
        return is_remote(self.original) or not isinstance(self.out, Path)

    @property
    def tasks(self) -> list[Task]:
        return [t for shard in self.shards for t in shard.tasks]

    @property
    def schemes(self) -> dict[str, LayerSpec]:
        """Weight name -> scheme, for the quantized weights."""
        return schemes_of(self.tasks)

    @property
    def kinds(self) -> list[LayerSpec]:
        """The different schemes, the one of most weights first."""
        sizes: dict[LayerSpec, int] = {}
        for t in self.tasks:
            if t.scheme is not None:
                sizes[t.scheme] = sizes.get(t.scheme, 0) + t.numel
        return sorted(sizes, key=lambda scheme: -sizes[scheme])

    @property
    def ignored(self) -> list[str]:
        """Names of the linears that stay as they are, as they lie on disk and as transformers has them. A tied head is
        not in the checkpoint, but engines build it as a linear, and would look for its packed weight if it were not
        named here."""
        named = [module_of(name) for t in self.tasks if t.scheme is None and t.is_linear for name in t.sources]
        if self.clients is not None:
            quantized = {other for name in self.schemes for other in self.clients.all_of(module_of(name))}
            named = [other for module in named for other in self.clients.all_of(module)]
            named += sorted(self.clients.linears - quantized - set(named), key=natural_key)
        return named if "lm_head" in named or "lm_head.weight" in self.schemes else [*named, "lm_head"]

    def quantization_config(self, calibration: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What config.json says of the result. calibration: what the manifest says of it."""
        facts = {"method": self.method.name, "calibration": calibration, "kv_cache": self.kv_cache}
        schemes = {}
        for name, scheme in self.schemes.items():
            module = module_of(name)
            for known in (module,) if self.clients is None else self.clients.all_of(module):
                schemes[known] = scheme
        return self.fmt.config(schemes, self.ignored, facts)

    @property
    def bytes_in(self) -> int:
        return sum(t.bytes_in for t in self.tasks)

    @property
    def bytes_out(self) -> int:
        return sum(t.bytes_out for t in self.tasks)

    @property
    def sizes(self) -> str:
        """ "269.0 MB -> 113.1 MB"; of a quantized source what it takes on disk beside what it expands to."""
        before = units.size(self.bytes_in)
        if self.stored.quantized:
            before = f"{units.size(self.stored.nbytes)} stored quantized, {before} expanded"
        return f"{before} -> {units.size(self.bytes_out)}"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_out / max(1, sum(t.numel for t in self.tasks))

    @property
    def bits_per_quantized_weight(self) -> float | None:
        done = [t for t in self.tasks if t.scheme is not None]
        return 8 * sum(t.bytes_out for t in done) / sum(t.numel for t in done) if done else None

    def as_dict(self) -> dict[str, Any]:
        """JSON for --dry-run --json."""
        return {
            "source": self.source,
            "out": str(self.out),
            "format": self.options.format,
            "method": self.method.name,
            "schemes": [asdict(scheme) for scheme in self.kinds],
            "kv_cache": self.kv_cache and {"kind": self.kv_cache, "calibrated": self.cache is not None, "bits": 8},
            "bytes_in": self.bytes_in,
            "bytes_stored": self.stored.nbytes,
            "bytes_out": self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "peak_memory_predicted_bytes": self.predicted.peak,
            "device_memory_predicted_bytes": self.predicted.on_device or None,
            "seconds_predicted": self.predicted.seconds,
            "disk_needed_bytes": self.disk_needed,
            "disk_free_bytes": self.disk_free,
            "workers": self.predicted.workers,
            "notes": list(self.notes),
            "shards": [{"file": s.file, "bytes": s.bytes_out} for s in self.shards],
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.meta.dtype,
                    "shape": list(t.meta.shape),
                    "scheme": t.scheme.describe() if t.scheme else None,
                    "kept": t.reason or None,
                    "bytes_out": t.bytes_out,
                }
                for t in self.tasks
            ],
        }


def make_plan(source: Source, out: Out, options: Options) -> Plan:
    """Decide everything, or raise QkitError. Reads no tensor and writes nothing."""
    from .. import formats

    device = resolve("cpu" if options.ray and options.device == "auto" else options.device)
    fmt = formats.get(options.format)
    slices = sliced(source, fmt.whole_experts)
    source = slices or source
    expanded = expand(source)
    source = expanded or source
    options, of_fit = fitting.choose(options, source, tuple(expanded.schemes.values()) if expanded else ())
    stored = () if expanded is None or options.scheme or options.recipe else tuple(expanded.schemes.values())
    if expanded is not None and stored and all(spec.kind in fmt.kinds for spec in stored):
        recipe = stored_recipe(expanded, options)
        options = replace(options, scheme=AS_STORED)
    else:
        if options.scheme is None:
            options = replace(options, scheme=fmt.default_scheme)
        recipe = make_recipe(options)
    recipe = check_recipe(recipe, options, fmt)
    check_source(source)
    source, options, of_cache = with_cache(source, expanded, fmt, options)
    cache = source if isinstance(source, CacheScales) and source.scales else None
    source = with_head(source, fmt, options)
    original, fmt = source, fmt.bound(source)
    source = fmt.view(source)
    method, notes = choose_method(recipe, options, original, fmt.calibrated, cache is not None)
    check_spread(options, method, fmt.container)
    notes = [*of_fit, *notes, *of_cache]
    if source.stored.quantized and expanded is None:
        notes.append(
            f"the source is itself quantized: {source.stored.describe()}, {units.size(source.stored.nbytes)} stored; "
            "its values are expanded to bfloat16 (each rounded by 0.2 % at most), and what it lost before is lost in "
            "the result too"
        )
    metas = {name: source.meta(name) for name in source.names()}
    narrowed = [n for n in original.names() if n in metas and original.meta(n).dtype == "F32" != metas[n].dtype]
    if narrowed:
        kept = model_dtype(source.config)
        notes.append(f"{len(narrowed)} float32 tensors are stored as {kept}: clients of {fmt.name} compute in one type")
    settled = settle(recipe, metas, fmt, model_dtype(source.config))
    chosen, of_head = choose_head(settled.choices, source, fmt, options, model_dtype(source.config))
    choices, more = fmt.choose(chosen, method.needs == "moments", options.head)
    more = [*of_head, *more]
    if slices is not None:
        more += experts.notes_of(slices, choices, fmt, source.config)
        if fmt.container != "gguf":  # which has them stacked in its own way
            source, choices = experts.join_kept(source, slices, choices)
    if expanded is not None:
        notes += notes_of(expanded, choices)
    tasks = make_tasks(source, choices, fmt)
    if recipe.schemes and not any(t.scheme for t in tasks):
        raise QkitError("no tensor of this checkpoint would be quantized", "check --skip, or use --scheme none")
    check_collisions(tasks)

    notes += of_what_stays(tasks)
    container = CONTAINERS[fmt.container]
    by_block = method.needs is not None and not method.observes
    name = title(source.base_model, [t.scheme for t in tasks if t.scheme], method.name, options)
    shards = container.shards(tasks, by_block, name, options.shard_size or SHARD_BYTES)
    moved = transfers(original, out, shards)
    predicted = predict(source, shards, fmt, method, options, device, cache is not None, moved)
    modules = [module_of(n) for n in source.names() if n.endswith(".weight")]
    clients = None
    if fmt.container == "safetensors" and recipe.schemes and names_needed(source.config, modules):
        clients = client_names(source.config, modules)
    needed, free = room(container.sidecars(original), tasks, predicted.scratch, out)
    plan = Plan(
        source=source.label,
        out=out,
        options=options,
        original=original,
        fmt=fmt,
        view=source,
        name=name,
        method=method,
        recipe=settled.recipe,
        shards=shards,
        notes=(*notes, *settled.notes, *more),
        device=device.id,
        predicted=predicted,
        disk_needed=needed,
        disk_free=free,
        stored=source.stored,
        clients=clients,
        cache=cache,
    )
    if clients is not None:
        check_names(plan, clients)
    return plan


def check_names(plan: Plan, clients: ClientNames) -> None:
    """The config says of every linear layer of transformers' model what the files hold, read as clients read it.

    Raises QkitError where it does not: the folder would not load."""
    if plan.fmt.name != "compressed-tensors":
        return
    reader = plan.fmt.parse(plan.quantization_config())
    stored = {clients.names.get(module_of(name), module_of(name)): scheme for name, scheme in plan.schemes.items()}
    for name in clients.linears:
        found, expected = reader.scheme(name), stored.get(name)
        if (found is None) != (expected is None) or (found and expected and found.describe() != expected.describe()):
            read, held = (spec.describe() if spec else "not quantized" for spec in (found, expected))
            raise QkitError(
                f"no config can be written for this model: {name} would be read as {read}, and is {held}",
                "please report the model's architecture; format safetensors or gguf may serve",
            )


def make_tasks(source: Source, choices: Mapping[str, LayerSpec | Keep], fmt: Format) -> list[Task]:
    """One task for each place in the format's files: for each tensor, or for several that the format stacks."""
    together: dict[str, list[str]] = {}
    for name, choice in choices.items():
        own = module_of(name) if isinstance(choice, LayerSpec) else name
        together.setdefault(fmt.place(own), []).append(name)
    tasks = []
    for place, names in together.items():
        meta, choice = source.meta(names[0]), choices[names[0]]
        if any(source.meta(name) != meta or choices[name] != choice for name in names[1:]):
            raise QkitError(f"{place} would stack tensors that differ in shape, type or scheme: {', '.join(names[:3])}")
        if isinstance(choice, LayerSpec):
            metas = fmt.out_metas((meta.shape[0], meta.shape[1]), choice)
            outputs = tuple((f"{place}{fmt.joint}{local}", m) for local, m in metas.items())
        else:
            outputs = ((place, meta),)
        if len(names) > 1:
            outputs = tuple((name, TensorMeta(m.dtype, (len(names), *m.shape))) for name, m in outputs)
        scheme, reason = (choice, "") if isinstance(choice, LayerSpec) else (None, choice.reason)
        tasks.append(Task(tuple(names), meta, scheme, reason, outputs))
    return tasks


def title(base_model: str, schemes: Sequence[LayerSpec], method: str, options: Options) -> str:
    """ "SmolLM2-135M-Instruct W4A16 g64 GPTQ", "Qwen3-8B Q4_K_M"; no byte may depend on the folder's name."""
    base = base_model.rpartition("/")[2]
    if not schemes:
        return base
    most = max(dict.fromkeys(schemes), key=schemes.count)
    if most.kind != "int":
        return f"{base} {(options.scheme or '').upper()}"
    group = "channel" if most.group_size == CHANNEL else f"g{most.group_size}"
    mixed = "" if len(set(schemes)) == 1 else " mixed"
    return f"{base} W{most.bits}A16 {group}{mixed} {method.upper()}"
