"""Models that see or hear: the text decoder of the config's `text_config`, and towers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .build import decoder
from .keys import Keys
from .part import Part
from .towers import PROJECTORS, TOWERS, patches
from .types import Architecture

UNCOUNTED = "{basis}; its towers are not known and not counted"


@dataclass(frozen=True)
class Kind:
    """text: the text decoder's type where the config names none; tower: the same; audio: it hears."""

    text: str
    tower: str
    audio: bool = False


# What transformers has where a nested config names no type.
KINDS: dict[str, Kind] = {
    "gemma3": Kind("gemma3_text", "siglip_vision_model"),
    "gemma3n": Kind("gemma3n_text", "gemma3n_vision"),
    "gemma4": Kind("gemma4_text", "gemma4_vision"),
    "paligemma": Kind("gemma", "siglip_vision_model"),
    "llava": Kind("llama", "clip_vision_model"),
    "llava_next": Kind("llama", "clip_vision_model"),
    "llava_onevision": Kind("qwen2", "siglip_vision_model"),
    "mistral3": Kind("mistral", "pixtral"),
    "qwen2_vl": Kind("qwen2_vl_text", "qwen2_vl_vision"),
    "qwen2_5_vl": Kind("qwen2_5_vl_text", "qwen2_5_vl_vision"),
    "qwen3_vl": Kind("qwen3_vl_text", "qwen3_vl_vision"),
    "qwen3_vl_moe": Kind("qwen3_vl_moe_text", "qwen3_vl_moe_vision"),
    "qwen3_5": Kind("qwen3_5_text", "qwen3_5_vision"),
    "qwen3_5_moe": Kind("qwen3_5_moe_text", "qwen3_5_moe_vision"),
    "mllama": Kind("mllama_text_model", "mllama_vision_model"),
    "llama4": Kind("llama4_text", "llama4_vision_model"),
    "internvl": Kind("qwen2", "internvl_vision"),
    "idefics3": Kind("llama", "idefics3_vision"),
    "smolvlm": Kind("llama", "smolvlm_vision"),
    "qwen2_audio": Kind("qwen2", "qwen2_audio_encoder", audio=True),
    "voxtral": Kind("llama", "voxtral_encoder", audio=True),
}
# Of old configs, which have the keys of the text decoder at the top.
_RENAMED = {"qwen2_vl": "qwen2_vl_vision", "qwen2_5_vl": "qwen2_5_vl_vision"}


def multimodal(k: Keys) -> Architecture:
    """Of a config with a part for the text, or of one of KINDS. Raises QkitError."""
    kind = KINDS.get(k.model_type)
    nested = k.config.get("text_config") is not None
    text = k.nested("text_config", kind.text if kind else "")
    if not nested and kind and k.has("hidden_size"):
        text = Keys(k.config, kind.text)
    arch = decoder(text, tied=k)
    part, known = _tower(k, kind, arch.hidden)
    if not known:
        return replace(arch, basis=UNCOUNTED.format(basis=arch.basis))
    if k.model_type == "mllama":
        arch = _seeing(arch, k.nested("vision_config", "mllama_vision_model"))
    return replace(arch, towers=part.matrices, towers_vectors=part.vectors)


def _tower(k: Keys, kind: Kind | None, hidden: int) -> tuple[Part, bool]:
    """(tower and projector, whether they are known)."""
    name = "audio_config" if kind and kind.audio else "vision_config"
    others = [key for key in ("vision_config", "audio_config") if k.config.get(key) is not None and key != name]
    if kind is None:
        return Part(), not others and k.config.get(name) is None
    tower = k.nested(name, kind.tower)
    tower = Keys(tower.config, _RENAMED.get(tower.model_type, tower.model_type), tower.where)
    made = TOWERS.get(tower.model_type)
    if made is None or others:
        return Part(), False
    projector = PROJECTORS.get(k.model_type)
    part = made(tower)
    return (part + projector(k, tower, hidden) if projector else part), True


def _seeing(arch: Architecture, vision: Keys) -> Architecture:
    """Llama 3.2 Vision: cross-attention layers keep the tokens of one picture, of as many tiles as it may have."""
    tokens = (patches(vision) + 1) * vision.size("max_num_tiles", 4)
    layers = tuple(
        replace(layer, caches=tuple(replace(c, window=tokens) if c.kind == "cross" else c for c in layer.caches))
        for layer in arch.layers
    )
    return replace(arch, layers=layers)
