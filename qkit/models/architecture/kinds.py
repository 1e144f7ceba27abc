"""What each layer attends to, where a config has no `layer_types`: the rules of transformers' config classes."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import QkitError
from .keys import MOST_LAYERS, Keys

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
KNOWN = (FULL, SLIDING, CHUNKED, LINEAR, "conv", "mlp", "moe", "hybrid", "cross_attention", "indexed_attention")
_OLD = {"attention": FULL, "mamba": LINEAR, "mamba2": LINEAR, "recurrent": LINEAR, "global": FULL, "local": SLIDING}
Kinds = Callable[[Keys, int], list[str]]


def given(k: Keys, key: str, layers: int) -> list[str] | None:
    """A list of the config's, in the words used here; None where it has none."""
    listed = k.listed(key, layers)
    if listed is None:
        return None
    found = [_OLD.get(name, name) if isinstance(name, str) else name for name in listed]
    unknown = [name for name in found if name not in KNOWN]
    if unknown:
        raise QkitError(f"{key} in config.json has {unknown[0]!r}", "known: " + ", ".join(KNOWN))
    return found


def layer_kinds(k: Keys, rule: Kinds) -> list[str]:
    """The kind of each layer: as listed, else by the family's rule."""
    listed = [k.get(key) for key in ("layer_types", "layers_block_type", "hybrid_override_pattern")]
    lengths = [len(each) for each in listed if isinstance(each, (list, str)) and each]
    if not lengths and not k.where and not k.has("num_hidden_layers"):
        k.missing("num_hidden_layers")
    layers = k.size("num_hidden_layers", lengths[0] if lengths else None, most=MOST_LAYERS)
    return given(k, "layer_types", layers) or rule(k, layers)


def windowed(k: Keys) -> bool:
    return k.get("sliding_window") not in (None, 0, False) and k.flag("use_sliding_window", True)


def uniform(k: Keys, layers: int) -> list[str]:
    """All alike: with a window where the config has one, in chunks where it has those."""
    if windowed(k):
        return [SLIDING] * layers
    return [CHUNKED if k.get("attention_chunk_size") is not None else FULL] * layers


def upper(k: Keys, layers: int) -> list[str]:
    """Qwen's: the layers from max_window_layers up."""
    first = k.size("max_window_layers", 0, least=0) if windowed(k) else layers
    return [SLIDING if index >= first else FULL for index in range(layers)]


def lower_odd(k: Keys, layers: int) -> list[str]:
    """Qwen2-MoE's: every other of the layers below max_window_layers."""
    last = k.size("max_window_layers", 0, least=0) if windowed(k) else 0
    return [SLIDING if index % 2 == 0 and index < last else FULL for index in range(layers)]


def every(default: int) -> Kinds:
    """All but every n-th have a window; n is `sliding_window_pattern`, or the default."""

    def rule(k: Keys, layers: int) -> list[str]:
        pattern = k.get("sliding_window_pattern")
        if isinstance(pattern, str) and pattern:  # EXAONE's "LLLG"
            return [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(layers)]
        step = k.size("sliding_window_pattern", default)
        if k.get("sliding_window") is None:
            return [FULL] * layers
        return [SLIDING if (index + 1) % step else FULL for index in range(layers)]

    return rule


def first_of_four(k: Keys, layers: int) -> list[str]:
    """CWM's."""
    return [SLIDING if index % 4 and windowed(k) else FULL for index in range(layers)]


def rotated(k: Keys, layers: int) -> list[str]:
    """Llama 4's: layers that rotate their keys see a chunk, the others everything."""
    rotates = k.listed("no_rope_layers", layers) or None
    if rotates is None:
        step = k.size("no_rope_layer_interval", 4)
        rotates = [int((index + 1) % step != 0) for index in range(layers)]
    return [CHUNKED if rotate else FULL for rotate in rotates]


def unrotated(k: Keys, layers: int) -> list[str]:
    """SmolLM3's: layers that do not rotate have the window, where there is one."""
    rotates = k.listed("no_rope_layers", layers)
    if rotates is None:
        step = k.size("no_rope_layer_interval", 4)
        rotates = [int((index + 1) % step != 0) for index in range(layers)]
    return [SLIDING if windowed(k) and not rotate else FULL for rotate in rotates]


def spaced(default: int) -> Kinds:
    """Linear attention but for every n-th layer; n is `full_attention_interval`, or the default."""

    def rule(k: Keys, layers: int) -> list[str]:
        step = k.size("full_attention_interval", default)
        return [LINEAR if (index + 1) % step else FULL for index in range(layers)]

    return rule


def states(k: Keys, layers: int) -> list[str]:
    """No attention anywhere."""
    return [LINEAR] * layers


def alternating(k: Keys, layers: int) -> list[str]:
    """MiniMax-01's: its files say so in attn_type_list, where 0 is linear attention."""
    listed = k.listed("attn_type_list", layers)
    if listed is not None:
        return [FULL if kind == 1 else LINEAR for kind in listed]
    return [LINEAR if index % 2 else FULL for index in range(layers)]
