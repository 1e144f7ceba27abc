"""Configs of every family: its class's defaults with few layers, and with what is unusual in it."""

from __future__ import annotations

from typing import Any

_FEW = {"num_hidden_layers": 4}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
# What the class's own defaults lack for a model to be made.
SHRUNK: dict[str, dict[str, Any]] = {
    **{
        kind: _FEW
        for kind in (
            "llama", "mistral", "ministral3", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next",
            "qwen3_5_text", "qwen3_5_moe_text", "gemma", "gemma2", "phi", "phi3", "phimoe", "gpt_neox", "opt", "falcon",
            "stablelm", "starcoder2", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe",
            "granitemoeshared", "granitemoehybrid", "deepseek_v3", "minicpm3", "glm4_moe_lite", "glm", "glm4",
            "glm4_moe", "gpt_oss", "llama4_text", "minimax", "minimax_m2", "ernie4_5", "ernie4_5_moe", "smollm3",
            "exaone4", "seed_oss", "arcee", "helium", "internlm3", "jamba", "mamba", "falcon_mamba", "mamba2", "bamba",
            "falcon_h1", "lfm2", "recurrent_gemma", "rwkv",
        )
    },
    "ministral": _FEW | {"head_dim": 128},
    "gemma3_text": {"num_hidden_layers": 7},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "intermediate_size": 16384,
                     "activation_sparsity_pattern": [0.0] * 10},
    "gpt2": {"n_layer": 3}, "gpt_bigcode": {"n_layer": 3}, "gptj": {"n_layer": 3}, "bloom": {"n_layer": 3},
    "mpt": {"n_layers": 3},
    "deepseek_v2": _FEW | {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "kimi_linear": {"num_hidden_layers": 6},
    "deepseek_v32": _FEW, "glm_moe_dsa": _FEW, "apertus": _FEW, "cwm": _FEW, "gemma4_text": {"num_hidden_layers": 8},
    "dots1": _FEW | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2,
                     "first_k_dense_replace": 1},
    "hunyuan_v1_dense": _FEW | {"head_dim": 128},
    "hunyuan_v1_moe": _FEW | {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "nemotron": _FEW | {"num_key_value_heads": 8},
    "nemotron_h": {"hybrid_override_pattern": "M*-ME"},
    "zamba2": _FEW | {"layers_block_type": _HYBRID},
    "lfm2_moe": _FEW | {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "t5": {}, "mt5": {"num_layers": 3, "num_decoder_layers": 2}, "umt5": {"num_layers": 2, "num_decoder_layers": 3},
    "bart": {"encoder_layers": 2, "decoder_layers": 3}, "mbart": {"encoder_layers": 2, "decoder_layers": 3},
    "whisper": {},
    "gemma3": {}, "paligemma": {}, "llava": {}, "llava_next": {}, "llava_onevision": {}, "mistral3": {},
    "qwen2_vl": {}, "qwen2_5_vl": {}, "qwen3_vl": {}, "qwen3_vl_moe": {}, "mllama": {}, "internvl": {}, "idefics3": {},
    "smolvlm": {}, "qwen2_audio": {}, "voxtral": {},
}  # fmt: skip
CHANGED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 96},
    "falcon": _FEW | {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "bias": True,
                      "hidden_size": 8192},
    "phi": {"qk_layernorm": True},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    "opt": {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16, "do_layer_norm_before": False},
    "cohere": _FEW | {"use_qk_norm": True, "attention_bias": True},
    "granitemoehybrid": _FEW | {"num_local_experts": 0, "layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "granitemoeshared": _FEW | {"shared_intermediate_size": 512},
    "seed_oss": _FEW | {"attention_out_bias": True, "mlp_bias": True},
    "starcoder2": _FEW | {"use_bias": False},
    "gemma2": {"attention_bias": True},
    "gemma3n_text": {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": 16384,
                     "activation_sparsity_pattern": [0.0] * 30},
    "gemma4_text": {"num_hidden_layers": 18, "num_kv_shared_layers": 6, "use_double_wide_mlp": True,
                    "attention_k_eq_v": True, "num_global_key_value_heads": 2, "enable_moe_block": True,
                    "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "glm_moe_dsa": {"num_hidden_layers": 6, "index_topk_freq": 2},
    "nemotron_h": {"hybrid_override_pattern": "M-M*EM", "moe_latent_size": 1024, "mlp_bias": True, "use_bias": True},
    "zamba2": _FEW | {"layers_block_type": _HYBRID, "num_mem_blocks": 2, "use_shared_attention_adapter": True},
    "qwen3_moe": {"mlp_only_layers": [1, 2], "decoder_sparse_step": 2},
    "jamba": {"num_experts": 4, "attn_layer_period": 5, "num_hidden_layers": 10},
    "deepseek_v3": {"q_lora_rank": None, "num_hidden_layers": 5, "attention_bias": True},
    "glm4_moe": _FEW | {"use_qk_norm": True, "attention_bias": True},
    "llama4_text": _FEW | {"interleave_moe_layer_step": 2},
    "falcon_h1": _FEW | {"mamba_rms_norm": True},
    "bamba": {"num_hidden_layers": 8, "attn_layer_indices": [3, 7]},
    "lfm2": {"num_hidden_layers": 6, "full_attn_idxs": [2, 5], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neox": _FEW | {"attention_bias": False},
    "phimoe": _FEW | {"attention_bias": True, "lm_head_bias": True},
    "ernie4_5_moe": _FEW | {"moe_layer_interval": 2, "use_bias": True},
    "mamba": {"use_bias": True, "use_conv_bias": False},
    "mamba2": _FEW | {"use_bias": True},
    "recurrent_gemma": {"num_key_value_heads": 1},
    "minimax": _FEW | {"attn_type_list": [0, 0, 0, 1], "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
}  # fmt: skip


def config_of(given: dict[str, Any]) -> Any:
    """transformers' config."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[given["model_type"]].from_dict(dict(given))
