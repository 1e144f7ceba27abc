"""Vision and audio towers with their projectors: matrices of all layers together, and a number of small parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .keys import Keys
from .part import Part
from .types import Matrix


def matrix(name: str, out: int, inp: int, count: int = 1) -> Matrix:
    return Matrix(name, out, inp, "tower", count, 0)


@dataclass(frozen=True)
class Blocks:
    """The layers of a transformer that sees everything at once.

    biases  of queries, keys, values, output; norm: values per channel of each of the two (2: with a bias); extra: other
            values per channel; scalars: other values
    """

    stem: str
    count: int
    width: int
    wide: int
    biases: int = 4
    gated: bool = False
    mlp_bias: bool = True
    norm: int = 2
    extra: int = 0
    scalars: int = 0
    fused: bool = False

    def part(self) -> Part:
        n, w = self.count, self.width
        at = f"{self.stem}.*"
        if self.fused:
            made = [matrix(f"{at}.attn.qkv", 3 * w, w, n), matrix(f"{at}.attn.proj", w, w, n)]
        else:
            made = [matrix(f"{at}.self_attn.{name}_proj", w, w, n) for name in ("q", "k", "v", "out")]
        ups = ("gate_proj", "up_proj") if self.gated else ("fc1",)
        made += [matrix(f"{at}.mlp.{name}", self.wide, w, n) for name in ups]
        made.append(matrix(f"{at}.mlp.{'down_proj' if self.gated else 'fc2'}", w, self.wide, n))
        each = w * (self.biases + 2 * self.norm + self.extra) + self.scalars
        each += (len(ups) * self.wide + w) if self.mlp_bias else 0
        return Part(tuple(made), n * each)


def side(k: Keys, name: str) -> int:
    """Of a picture or a patch, which some configs give twice."""
    value = k.get(name)
    return k.at(name, 0) if isinstance(value, list) else k.size(name)


def patches(k: Keys) -> int:
    return (side(k, "image_size") // side(k, "patch_size")) ** 2


def pixels(k: Keys) -> int:
    """Inputs of a patch."""
    return k.size("num_channels", 3) * side(k, "patch_size") ** 2


def linear(name: str, out: int, inp: int, bias: bool = True) -> Part:
    return Part((matrix(name, out, inp),), out if bias else 0)


def siglip(k: Keys) -> Part:
    """SigLIP, and what Idefics 3 made of it."""
    width, wide = k.size("hidden_size"), k.size("intermediate_size")
    part = linear("vision_tower.embeddings.patch_embedding", width, pixels(k))
    part += Part((matrix("vision_tower.embeddings.position_embedding", patches(k), width),), 2 * width)
    part += Blocks("vision_tower.encoder.layers", k.size("num_hidden_layers"), width, wide).part()
    if k.model_type.startswith("siglip") and k.flag("vision_use_head", True):
        head = Blocks("vision_tower.head", 1, width, wide, norm=1).part()
        part += head + Part((), width)  # one norm with a bias, and the probe
    return part


def clip(k: Keys) -> Part:
    width = k.size("hidden_size")
    part = linear("vision_tower.embeddings.patch_embedding", width, pixels(k), False)
    part += Part((matrix("vision_tower.embeddings.position_embedding", patches(k) + 1, width),), 5 * width)
    return (
        part
        + Blocks("vision_tower.encoder.layers", k.size("num_hidden_layers"), width, k.size("intermediate_size")).part()
    )


def pixtral(k: Keys) -> Part:
    width = k.size("hidden_size")
    part = linear("vision_tower.patch_conv", width, pixels(k), False) + Part((), width)
    return part + Blocks(
        "vision_tower.transformer.layers", k.size("num_hidden_layers"), width, k.size("intermediate_size"), 0, True,
        False, 1,
    ).part()  # fmt: skip


def intern(k: Keys) -> Part:
    width, biases = k.size("hidden_size"), 4 if k.flag("attention_bias") else 1
    part = linear("vision_tower.embeddings.patch_embeddings", width, pixels(k)) + Part((), width)
    if k.flag("use_absolute_position_embeddings", True):
        part += Part((matrix("vision_tower.embeddings.position_embeddings", patches(k) + 1, width),))
    part += Part((), 0 if k.flag("use_mean_pooling", True) else 2 * width)
    norm = 1 if k.get("norm_type") == "rms_norm" else 2
    extra = 2 + (2 if k.flag("use_qk_norm") else 0) * norm
    return part + Blocks(
        "vision_tower.encoder.layer", k.size("num_hidden_layers"), width, k.size("intermediate_size"), biases,
        norm=norm, extra=extra,
    ).part()  # fmt: skip


def qwen(k: Keys) -> Part:
    """The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with what merges patches."""
    depth, merge = k.size("depth"), k.size("spatial_merge_size", 2) ** 2
    volume = k.size("temporal_patch_size", 2) * k.size("in_channels", 3) * side(k, "patch_size") ** 2
    first = k.model_type.startswith("qwen2_vl")
    second = k.model_type.startswith("qwen2_5")
    width = k.size("embed_dim") if first else k.size("hidden_size")
    out = k.size("hidden_size") if first else k.size("out_hidden_size")
    wide = k.size("mlp_ratio", 4) * width if first else k.size("intermediate_size")
    part = linear("visual.patch_embed.proj", width, volume, not first and not second)
    if not first and not second:
        part += Part((matrix("visual.pos_embed", k.size("num_position_embeddings"), width),))
    part += Blocks("visual.blocks", depth, width, wide, gated=second, norm=1 if second else 2, fused=True).part()
    mixed = merge * width

    def merger(name: str, norm: int) -> Part:
        return linear(f"{name}.fc1", mixed, mixed) + linear(f"{name}.fc2", out, mixed) + Part((), norm)

    part += merger("visual.merger", width if second else 2 * width)
    for index in range(len(k.listed("deepstack_visual_indexes") or ())):
        part += merger(f"visual.deepstack_merger_list.{index}", 2 * mixed)
    return part


def mllama(k: Keys) -> Part:
    width, wide = k.size("hidden_size"), k.size("intermediate_size")
    tiles, ratios = k.size("max_num_tiles", 4), len(k.listed("supported_aspect_ratios") or [[1, 1]] * 8) + 1
    tokens = patches(k) + 1
    part = linear("vision_model.patch_embedding", width, pixels(k), False)
    part += Part(
        (
            matrix("vision_model.gated_positional_embedding.embedding", tokens, width),
            matrix("vision_model.gated_positional_embedding.tile_embedding", ratios, tiles * tokens * width),
            matrix("vision_model.pre_tile_positional_embedding.embedding", ratios, tiles * width),
            matrix("vision_model.post_tile_positional_embedding.embedding", ratios, tiles * width),
        ),
        5 * width + 3,
    )
    layers, over = k.size("num_hidden_layers"), k.size("num_global_layers", 8)
    part += Blocks("vision_model.transformer.layers", layers, width, wide, 0).part()
    return part + Blocks("vision_model.global_transformer.layers", over, width, wide, 0, scalars=2).part()


def llama4(k: Keys) -> Part:
    width, wide = k.size("hidden_size"), k.size("intermediate_size")
    part = linear("vision_model.patch_embedding.linear", width, pixels(k), False)
    part += Part((matrix("vision_model.positional_embedding_vlm", patches(k) + 1, width),), 5 * width)
    part += Blocks("vision_model.model.layers", k.size("num_hidden_layers"), width, wide).part()
    inner, out = k.size("projector_input_dim"), k.size("projector_output_dim")
    part += linear("vision_model.vision_adapter.mlp.fc1", inner, wide, False)
    return part + linear("vision_model.vision_adapter.mlp.fc2", out, inner, False)


def listener(k: Keys) -> Part:
    """Whisper's encoder, in a model that talks."""
    width = k.size("hidden_size")
    wide = k.size("intermediate_size")
    layers = k.size("num_hidden_layers")
    part = linear("audio_tower.conv1", width, 3 * k.size("num_mel_bins")) + linear(
        "audio_tower.conv2", width, 3 * width
    )
    part += Part((matrix("audio_tower.embed_positions", k.size("max_source_positions"), width),), 2 * width)
    return part + Blocks("audio_tower.layers", layers, width, wide, 3).part()


TOWERS: dict[str, Callable[[Keys], Part]] = {
    "siglip_vision_model": siglip, "idefics3_vision": siglip, "smolvlm_vision": siglip, "clip_vision_model": clip,
    "pixtral": pixtral, "internvl_vision": intern, "qwen2_vl_vision": qwen, "qwen2_5_vl_vision": qwen,
    "qwen3_vl_vision": qwen, "qwen3_vl_moe_vision": qwen, "qwen3_5_vision": qwen, "qwen3_5_moe_vision": qwen,
    "mllama_vision_model": mllama, "llama4_vision_model": llama4, "qwen2_audio_encoder": listener,
    "voxtral_encoder": listener,
}  # fmt: skip


# Projectors: (whole config, tower's config, width of the text model).
Projector = Callable[[Keys, Keys, int], Part]


def _two(k: Keys, v: Keys, hidden: int) -> Part:
    """LLaVA's, whose newer kinds mark the ends of lines."""
    bias = k.flag("multimodal_projector_bias", True)
    layers = k.get("vision_feature_layer")
    seen = v.size("hidden_size") * (len(layers) if isinstance(layers, list) else 1)
    ends = hidden if k.model_type in ("llava_next", "llava_onevision") else 0
    name = "multi_modal_projector.linear"
    return linear(f"{name}_1", hidden, seen, bias) + linear(f"{name}_2", hidden, hidden, bias) + Part((), ends)


def _gemma(k: Keys, v: Keys, hidden: int) -> Part:
    width = v.size("hidden_size")
    return Part((matrix("multi_modal_projector.mm_input_projection_weight", width, hidden),), width)


def _merged(k: Keys, v: Keys, hidden: int) -> Part:
    """Mistral Small's: patches of a square become one."""
    width, merge = v.size("hidden_size"), k.size("spatial_merge_size", 2) ** 2
    part = linear("multi_modal_projector.patch_merger.merging_layer", width, merge * width, False)
    return part + _two(replace_default_bias(k), v, hidden) + Part((), width)


def replace_default_bias(k: Keys) -> Keys:
    if k.has("multimodal_projector_bias"):
        return k
    return Keys({**k.config, "multimodal_projector_bias": False}, k.model_type, k.where)


def _intern(k: Keys, v: Keys, hidden: int) -> Part:
    seen = v.size("hidden_size") * round((1 / k.number("downsample_ratio", 0.5)) ** 2)
    name = "multi_modal_projector.linear"
    return linear(f"{name}_1", hidden, seen) + linear(f"{name}_2", hidden, hidden) + Part((), 2 * seen)


def _shuffled(k: Keys, v: Keys, hidden: int) -> Part:
    """Idefics 3 and SmolVLM."""
    seen = v.size("hidden_size") * k.size("scale_factor", 2) ** 2
    return linear("connector.modality_projection.proj", hidden, seen, False)


def _heard(k: Keys, v: Keys, hidden: int) -> Part:
    """Voxtral takes several steps at once."""
    name = "multi_modal_projector.linear"
    seen = v.size("intermediate_size")
    return linear(f"{name}_1", hidden, seen, False) + linear(f"{name}_2", hidden, hidden, False)


PROJECTORS: dict[str, Projector] = {
    "llava": _two, "llava_next": _two, "llava_onevision": _two, "gemma3": _gemma, "mistral3": _merged,
    "internvl": _intern, "idefics3": _shuffled, "smolvlm": _shuffled, "voxtral": _heard,
    "paligemma": lambda k, v, hidden: linear("multi_modal_projector.linear", hidden, v.size("hidden_size")),
    "qwen2_audio": lambda k, v, hidden: linear("multi_modal_projector.linear", hidden, v.size("hidden_size")),
    "mllama": lambda k, v, hidden: linear("multi_modal_projector", hidden, v.size("vision_output_dim")),
    "llama4": lambda k, v, hidden: linear(
        "multi_modal_projector.linear_1", hidden, v.size("vision_output_dim"), False
    ),
}  # fmt: skip
