"""The families whose models are known here, each as its differences from Llama. Names are those of the files."""

from __future__ import annotations

from dataclasses import replace

from . import gemma, kinds, oddities, states
from .attention import grouped, indexed, latent
from .family import Family
from .mlp import Moe, Shared, after_first, after_one, between, interleaved, periodic, stepwise
from .states import named

_W = ("w1", "w3", "w2")
_LLAMA = Family()
_PLAIN = replace(_LLAMA, qkv_bias=False, mlp_bias=False)  # no biases at all
_QWEN2 = Family(qkv_bias=True, out_bias=False, mlp_bias=False, rule=kinds.upper)
_QWEN3 = Family(qk_norm="head", mlp_bias=False, rule=kinds.upper)
_GEMMA = Family(mlp_bias=False, tied=True)
_GEMMA2 = replace(_GEMMA, norms=4, rule=kinds.every(2))
_GEMMA3 = replace(_GEMMA2, qk_norm="head", rule=kinds.every(6))
_QWEN_MOE = Moe(sparse=stepwise)
_QWEN_SHARED = Shared("mlp.shared_expert", width="shared_expert_intermediate_size", gate="shared_expert_gate")
_DEEPSEEK = Moe(sparse=after_first, shared=Shared("mlp.shared_experts"), correction=True)
_BLOCK = "block_sparse_moe"
_MIXTRAL = Moe(_BLOCK, _W, width=("intermediate_size",))
_GRANITE = Moe(_BLOCK, router="router.layer", width=("intermediate_size",))
_GRANITE_SHARED = replace(
    _GRANITE, shared=Shared("shared_mlp", ("input_linear", "output_linear"), "shared_intermediate_size")
)
_GLM = Family(
    ffn=("gate_up_proj", "down_proj"), out_bias=False, mlp_bias=False
)  # fmt: skip
_QWEN3_NEXT = Family(
    qk_norm="head", gated_queries=True, mlp_bias=False, rule=kinds.spaced(4),
    mixers={kinds.LINEAR: states.delta}, moe=replace(_QWEN_MOE, shared=_QWEN_SHARED),
)  # fmt: skip
_QWEN3_5 = replace(_QWEN3_NEXT, mixers={kinds.LINEAR: named(states.delta, apart=True)}, moe=None)
# The families of 2019 to 2023: norms and linears with biases, an MLP without a gate, four times as wide.
_OLD = Family(
    layers="transformer.h", embedding="transformer.wte", attention="attn", qkv=("c_attn",), out="c_proj", qkv_bias=True,
    ffn=("c_fc", "c_proj"), gated=False, mlp_bias=True, four_times=True, norm="layer",
)  # fmt: skip
_NEOX = replace(
    _OLD, embedding="gpt_neox.embed_in", layers="gpt_neox.layers", head="embed_out", attention="attention",
    qkv=("query_key_value",), out="dense", ffn=("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip
_BLOOM = replace(
    _NEOX, embedding="transformer.word_embeddings", layers="transformer.h", head="lm_head", attention="self_attention"
)
_MAMBA = Family(
    embedding="backbone.embeddings", layers="backbone.layers", rule=kinds.states, single=(kinds.LINEAR,)
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _PLAIN,
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mixtral": replace(_PLAIN, moe=_MIXTRAL),
    "qwen2": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl_text": replace(_QWEN3, rule=kinds.uniform),
    "qwen2_moe": replace(
        _QWEN2, qkv_bias="qkv_bias", rule=kinds.lower_odd, moe=replace(_QWEN_MOE, shared=_QWEN_SHARED)
    ),
    "qwen3_moe": replace(_QWEN3, rule=kinds.uniform, moe=_QWEN_MOE),
    "qwen3_vl_moe_text": replace(_QWEN3, rule=kinds.uniform, moe=_QWEN_MOE),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": replace(
        _QWEN3_5, moe=Moe(shared=_QWEN_SHARED)
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3n_text": replace(
        _GEMMA3, rule=kinds.every(5), mixer=gemma.gemma3n, extra=gemma.gemma3n_extra,
        outside=gemma.gemma3n_outside,
    ),
    "gemma4_text": replace(
        _GEMMA3, rule=gemma.gemma4_layers, mixer=gemma.gemma4, extra=gemma.gemma4_extra, width=gemma.gemma4_width,
        outside=lambda k, f: gemma.tables(k),
    ),
    "phi": replace(
        _OLD, embedding="model.embed_tokens", layers="model.layers", attention="self_attn", qkv=_LLAMA.qkv, out="dense",
        ffn=("fc1", "fc2"), norms=1, qk_norm="head", qk_norm_if="qk_layernorm", qk_norm_bias=True, head_bias=True,
    ),
    "phi3": replace(_PLAIN, qkv=("qkv_proj",), ffn=("gate_up_proj", "down_proj")),
    "phimoe": Family(norm="layer", moe=_MIXTRAL, head_bias="lm_head_bias"),
    "gpt2": replace(_OLD, outside=oddities.positions, tied=True),
    "gpt_bigcode": replace(_OLD, kv_heads=oddities.one_or_all, outside=oddities.positions, tied=True),
    "gptj": replace(
        _OLD, qkv=_LLAMA.qkv, out="out_proj", qkv_bias=False, ffn=("fc_in", "fc_out"), norms=1, head_bias=True
    ),
    "gpt_neox": replace(_NEOX, qkv_bias="attention_bias"),
    "opt": replace(
        _OLD, embedding="model.decoder.embed_tokens", layers="model.decoder.layers", attention="self_attn",
        qkv=_LLAMA.qkv, out="out_proj", qkv_bias="enable_bias", mlp="", ffn=("fc1", "fc2"), mlp_bias="enable_bias",
        norm_bias="layer_norm_elementwise_affine", outside=oddities.opt, final_norm=False,
        tied=True, embedding_width="word_embed_proj_dim",
    ),
    "falcon": replace(
        _BLOOM, qkv_bias="bias", mlp_bias="bias", kv_heads=oddities.falcon_heads, norms=oddities.falcon_norms, tied=True
    ),
    "bloom": replace(_BLOOM, outside=oddities.bloom, tied=True),
    "mpt": replace(
        _OLD, layers="transformer.blocks", qkv=("Wqkv",), out="out_proj", qkv_bias=False, mlp="ffn",
        ffn=("up_proj", "down_proj"), mlp_bias=False, norm="rms", tied=True, width=oddities.expanded,
    ),
    "stablelm": Family(
        qkv_bias="use_qkv_bias", out_bias=False, mlp_bias=False, norm="layer", norms=oddities.stablelm_norms,
        qk_norm="heads", qk_norm_if="qk_layernorm",
    ),
    "starcoder2": replace(
        _OLD, embedding="model.embed_tokens", layers="model.layers", attention="self_attn", qkv=_LLAMA.qkv,
        out="o_proj", qkv_bias="use_bias", mlp_bias="use_bias", tied=True,
    ),
    "cohere": Family(mlp_bias=False, norms=1, qk_norm="heads", qk_norm_if="use_qk_norm", tied=True),
    "cohere2": Family(mlp_bias=False, norms=1, rule=kinds.every(4), tied=True),
    "olmo": Family(mlp_bias=False, norm=""),
    "olmo2": Family(mlp_bias=False, qk_norm="heads"),
    "olmo3": Family(mlp_bias=False, qk_norm="heads", rule=kinds.every(4)),
    "olmoe": Family(mlp_bias=False, qk_norm="heads", moe=Moe(width=("intermediate_size",))),
    "granite": _LLAMA,
    "granitemoe": Family(mlp_bias=False, moe=_GRANITE),
    "granitemoeshared": Family(mlp_bias=False, moe=_GRANITE_SHARED),
    "granitemoehybrid": Family(
        mlp_bias=False, rule=kinds.states, mixers={kinds.LINEAR: states.mamba2}, moe=_GRANITE_SHARED
    ),
    "deepseek_v2": Family(mixer=latent, moe=replace(_DEEPSEEK, correction=False)),
    "deepseek_v3": Family(mixer=latent, mlp_bias=False, moe=_DEEPSEEK),
    "deepseek_v32": Family(mixer=indexed, mlp_bias=False, moe=_DEEPSEEK),
    "glm_moe_dsa": Family(mixer=indexed, mlp_bias=False, moe=_DEEPSEEK),
    "kimi_k2": Family(mixer=latent, mlp_bias=False, moe=_DEEPSEEK),
    "minicpm3": Family(mixer=latent),
    "glm4_moe_lite": Family(mixer=latent, mlp_bias=False, moe=replace(_DEEPSEEK, sparse=after_one)),
    "kimi_linear": Family(
        mixer=latent, mixers={kinds.LINEAR: states.kimi}, mlp_bias=False, rule=oddities.kimi_layers,
        moe=Moe(_BLOCK, _W, sparse=after_one, shared=Shared(f"{_BLOCK}.shared_experts"), correction=True),
    ),
    "dots1": Family(qk_norm="head", mlp_bias=False, rule=kinds.upper, moe=_DEEPSEEK),
    "glm": _GLM,
    "glm4": replace(_GLM, norms=4),
    "glm4_moe": Family(
        out_bias=False, mlp_bias=False, qk_norm="head", qk_norm_if="use_qk_norm", moe=_DEEPSEEK
    ),
    "gpt_oss": Family(
        sinks=True, rule=kinds.every(2), moe=Moe(router="router", width=("intermediate_size",), bias=True)
    ),
    "llama4_text": Family(
        mlp="feed_forward", mlp_bias=False, rule=kinds.rotated, width="intermediate_size_mlp",
        moe=Moe(
            "feed_forward", router="router", sparse=interleaved, width=("intermediate_size",),
            shared=Shared("feed_forward.shared_expert", width="intermediate_size"),
        ),
    ),
    "mllama_text_model": replace(_PLAIN, mixers={"cross_attention": oddities.mllama}, rule=oddities.mllama_layers,
                                 embedding="language_model.model.embed_tokens", layers="language_model.model.layers",
                                 head="language_model.lm_head", more_rows=8),
    "minimax": replace(
        _PLAIN, rule=kinds.alternating, mixers={kinds.LINEAR: states.lightning}, moe=_MIXTRAL
    ),
    "minimax_m2": replace(_PLAIN, qk_norm="heads", moe=replace(_MIXTRAL, correction=True)),
    "ernie4_5": Family(qkv_bias="use_bias", mlp_bias="use_bias", tied=True),
    "ernie4_5_moe": Family(
        qkv_bias="use_bias", mlp_bias="use_bias", head_bias="use_bias", moe=replace(_DEEPSEEK, sparse=between)
    ),
    "smollm3": replace(_LLAMA, rule=kinds.unrotated),
    "exaone4": replace(_PLAIN, qk_norm="head", rule=kinds.every(4)),
    "hunyuan_v1_dense": Family(mlp_bias=False, qk_norm="head"),
    "hunyuan_v1_moe": Family(
        mlp_bias=False, qk_norm="head",
        moe=Moe(router="gate.wg", width=("moe_intermediate_size", "intermediate_size"),
                shared=Shared("mlp.shared_mlp", width="intermediate_size")),
    ),
    "seed_oss": Family(out_bias="attention_out_bias"),
    "nemotron": Family(ffn=("up_proj", "down_proj"), gated=False, norm="layer"),
    "apertus": Family(ffn=("up_proj", "down_proj"), gated=False, mlp_bias=False, qk_norm="head", extra=oddities.slopes),
    "cwm": replace(_PLAIN, rule=kinds.first_of_four),
    "arcee": Family(ffn=("up_proj", "down_proj"), gated=False),
    "helium": Family(out_bias=False),
    "internlm3": _LLAMA,
    "nemotron_h": Family(
        embedding="backbone.embeddings", layers="backbone.layers", attention="mixer", qkv_bias=False, mlp="mixer",
        ffn=("up_proj", "down_proj"), gated=False, rule=oddities.nemotron_layers,
        mixers={
            kinds.LINEAR: named(states.mamba2, module="mixer"), kinds.FULL: grouped,
            "mlp": oddities.bare_mlp, "moe": oddities.bare_moe,
        },
        single=(kinds.LINEAR, kinds.FULL, "mlp", "moe"),
        moe=Moe("mixer", ("up_proj", "down_proj"), correction=True,
                shared=Shared("mixer.shared_experts", ("up_proj", "down_proj"), "moe_shared_expert_intermediate_size")),
    ),
    "jamba": replace(
        _PLAIN, mlp="feed_forward", rule=oddities.jamba_layers,
        mixers={kinds.LINEAR: named(states.mamba1, module="mamba", norms=True)},
        moe=Moe("feed_forward", router="router", sparse=periodic, width=("intermediate_size",)),
    ),
    "mamba": replace(_MAMBA, mixer=states.mamba1, tied=True),
    "falcon_mamba": replace(_MAMBA, mixer=states.mamba1, tied=True),
    "mamba2": replace(_MAMBA, mixer=named(states.mamba2, module="mixer")),
    "bamba": Family(mlp="feed_forward", rule=oddities.bamba_layers, mixers={kinds.LINEAR: states.mamba2}),
    "falcon_h1": Family(mlp="feed_forward", rule=oddities.hybrid, mixers={"hybrid": states.beside}),
    "zamba2": Family(
        rule=oddities.zamba_layers, mixers={kinds.LINEAR: states.mamba2, "hybrid": states.shared},
        single=(kinds.LINEAR, "hybrid"), tied=True,
    ),
    "lfm2": Family(
        qkv_bias=False, out="out_proj", qk_norm="head", mlp="feed_forward", ffn=_W, mlp_bias=False,
        rule=oddities.lfm2_layers, mixers={"conv": states.short}, tied=True, width=oddities.rounded,
    ),
    "lfm2_moe": Family(
        qkv_bias=False, out="out_proj", qk_norm="head", mlp="feed_forward", ffn=_W, mlp_bias=False,
        rule=oddities.lfm2_layers, mixers={"conv": states.short}, tied=True,
        moe=Moe("feed_forward", _W, sparse=after_one, correction="use_expert_bias"),
    ),
    "recurrent_gemma": Family(
        attention="temporal_block", out_bias=True, mlp="mlp_block", mlp_bias=True, width=oddities.halved,
        rule=oddities.griffin_layers,
        mixer=oddities.local_attention, mixers={kinds.LINEAR: states.gated_recurrence}, tied=True,
    ),
    "rwkv": Family(
        embedding="rwkv.embeddings", layers="rwkv.blocks", head="head", norm="layer", rule=kinds.states,
        mixer=states.rwkv, single=(kinds.LINEAR,),
    ),
}  # fmt: skip
