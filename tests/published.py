"""Shapes of published models, as their config.json has them (keys that decide no shape left out).

name -> (config, parameters as the model's card or its files count them where known, those that a token meets)
"""

from __future__ import annotations

from typing import Any

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
LLAMA4_VISION = {
    "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projector_input_dim": 4096,
    "projector_output_dim": 4096, "vision_output_dim": 4096,
}  # fmt: skip


def shape(
    kind: str, hidden: int, wide: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, **more,
    }  # fmt: skip


DEEPSEEK = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int | None, float | None]] = {
    "Llama-2-7B": (shape("llama", 4096, 11008, 32, 32, 32, 32000), 6_738_415_616, None),
    "Llama-3.1-8B": (shape("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248, None),
    "Llama-3.2-1B": (
        shape("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True), 1_235_814_400, None
    ),
    "Llama-3.3-70B": (shape("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496, None),
    "Mistral-7B": (shape("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096), 7_241_732_096, None),
    "Mistral-Small-24B": (
        shape("mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128, sliding_window=None), 23_572_403_200, None
    ),
    "Qwen2.5-7B": (shape("qwen2", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512, None),
    "Qwen3-32B": (shape("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128), 32_762_123_264, None),
    "Qwen3-30B-A3B": (
        shape("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[]),
        30_532_122_624, 3.0e9,
    ),
    "Qwen3-235B-A22B": (
        shape("qwen3_moe", 4096, 12288, 94, 64, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=1536),
        235_093_634_560, 21.6e9,
    ),
    "Qwen3-Next-80B-A3B": (
        shape("qwen3_next", 2048, 5120, 48, 16, 2, 151936, head_dim=256, num_experts=512, num_experts_per_tok=10,
              moe_intermediate_size=512, shared_expert_intermediate_size=512, full_attention_interval=4,
              linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
              linear_conv_kernel_dim=4),
        None, 3.6e9,
    ),
    "Mixtral-8x7B": (
        shape("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704, 12.8e9,
    ),
    "Gemma-2-9B": (
        shape("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, sliding_window=4096), 9_241_705_984, None
    ),
    "Gemma-3-27B": (
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
                "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
            },
            "vision_config": SIGLIP,
        },
        27_432_406_640, None,
    ),
    "Phi-3.5-mini": (shape("phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=262144), 3_821_079_552, None),
    "Phi-3.5-MoE": (
        shape("phimoe", 4096, 6400, 32, 32, 8, 32064, num_local_experts=16, num_experts_per_tok=2, attention_bias=True,
              lm_head_bias=True),
        41_873_153_344, 6.5e9,
    ),
    "Command-R": (shape("cohere", 8192, 22528, 40, 64, 64, 256000), 34_980_831_232, None),
    "Command-R7B": (shape("cohere2", 4096, 14336, 32, 32, 8, 256000, sliding_window=4096), None, None),
    "Falcon-7B": (
        {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
         "vocab_size": 65024, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
        6_921_720_704, None,
    ),
    "Falcon-40B": (
        {"model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
         "num_kv_heads": 8, "vocab_size": 65024, "new_decoder_architecture": True},
        None, None,
    ),
    "DeepSeek-V2-Lite": (
        shape("deepseek_v2", 2048, 10944, 27, 16, 16, 102400, **DEEPSEEK, q_lora_rank=None, n_routed_experts=64,
              n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1),
        15_706_484_224, 2.5e9,
    ),
    "DeepSeek-V3": (
        shape("deepseek_v3", 7168, 18432, 61, 128, 128, 129280, **DEEPSEEK, q_lora_rank=1536, n_routed_experts=256,
              n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
              num_nextn_predict_layers=1),
        None, 36.7e9,
    ),
    "GLM-4.5-Air": (
        shape("glm4_moe", 4096, 10944, 46, 96, 8, 151552, head_dim=128, attention_bias=True, n_routed_experts=128,
              n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408, first_k_dense_replace=1,
              num_nextn_predict_layers=1),
        None, 12.8e9,
    ),
    "gpt-oss-120b": (
        shape("gpt_oss", 2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128, num_experts_per_tok=4,
              sliding_window=128, attention_bias=True),
        116_829_156_672, 5.13e9,
    ),
    "Llama-4-Scout": (
        {
            "model_type": "llama4",
            "text_config": shape(
                "llama4_text", 5120, 8192, 48, 40, 8, 202048, head_dim=128, intermediate_size_mlp=16384,
                num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=8192,
            ),
            "vision_config": LLAMA4_VISION,
        },
        108_641_793_536, 16.1e9,
    ),
    "OLMo-2-7B": (shape("olmo2", 4096, 11008, 32, 32, 32, 100352), 7_298_617_344, None),
    "Jamba-Mini": (
        shape("jamba", 4096, 14336, 32, 32, 8, 65536, num_experts=16, num_experts_per_tok=2, mamba_d_state=16),
        51_570_323_328, 12e9,
    ),
    "SmolLM3-3B": (shape("smollm3", 2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True), 3_075_098_624, None),
}  # fmt: skip
