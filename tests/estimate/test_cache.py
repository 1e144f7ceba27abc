"""Bytes of KV caches against what transformers' caches hold after a real forward pass; engines' rules by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import config_of
from published import PUBLISHED

from qkit.errors import QkitError
from qkit.estimate.cache import Setting, kv, kv_bytes
from qkit.models.architecture import architecture

W = 8  # every window and chunk
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
BASE = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
TINY = BASE | HEADS
DIM = TINY | {"head_dim": 16}
MLA = BASE | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
GPT = {"vocab_size": 199, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
SSM = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}
ENCODER = {
    "vocab_size": 199, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
HALF = ["linear_attention", "full_attention"] * 2
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DIM,
    "mistral": DIM | {"sliding_window": W},
    "qwen2": TINY,
    "qwen2 with windows": TINY | {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 2},
    "qwen3": DIM,
    "gemma2": DIM | {"sliding_window": W},
    "gemma3_text": DIM | {"sliding_window": W, "num_hidden_layers": 7},
    "gemma3n_text": DIM | {
        "sliding_window": W, "num_hidden_layers": 10, "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 199, "laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": [96] * 10,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "mixtral": DIM | {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": TINY,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {k: v for k, v in TINY.items() if k != "num_key_value_heads"},
    "opt": {k: v for k, v in BASE.items() if k != "intermediate_size"} | {
        "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "falcon": {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "bloom": {"vocab_size": 199, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 199, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "starcoder2": TINY | {"sliding_window": W},
    "cohere2": TINY | {"sliding_window": W},
    "olmo3": TINY | {"sliding_window": W},
    "exaone4": DIM | {"sliding_window": W},
    "smollm3": TINY | {"use_sliding_window": True, "sliding_window": W},
    "gpt_oss": DIM | {"sliding_window": W, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": DIM | {
        "attention_chunk_size": W, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1},
    "deepseek_v2": MLA | MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": MLA | MOE | {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "minicpm3": MLA,
    "deepseek_v32": MLA | MOE | {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "gemma4_text": DIM | {
        "sliding_window": W, "num_hidden_layers": 12, "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 199, "global_head_dim": 32},
    "kimi_linear": MLA | {
        "q_lora_rank": None, "num_hidden_layers": 6, "linear_num_heads": 4, "linear_head_dim": 16, "num_experts": 4,
        "num_experts_per_token": 2, "moe_intermediate_size": 32, "num_shared_experts": 1},
    "qwen3_next": DIM | DELTA | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DIM | DELTA,
    "minimax": DIM | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "jamba": TINY | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False},
    "bamba": TINY | MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": TINY | MAMBA2 | {"layer_types": HALF, "num_local_experts": 0, "shared_intermediate_size": 32},
    "falcon_h1": TINY | MAMBA2 | {"mamba_d_ssm": 128},
    "zamba2": BASE | {
        "num_attention_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "nemotron_h": {k: v for k, v in DIM.items() if k != "num_hidden_layers"} | {
        "hybrid_override_pattern": "M*-M", "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8,
        "n_groups": 2},
    "mamba": SSM,
    "falcon_mamba": SSM,
    "mamba2": SSM | {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "lfm2": TINY | {"full_attn_idxs": [1]},
    "t5": {"vocab_size": 199, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "bart": ENCODER | {"max_position_embeddings": 64},
    "whisper": ENCODER | {
        "max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1},
}  # fmt: skip
SOURCE = 11  # tokens of an encoder's input


def made(name: str) -> tuple[Any, Any]:
    """(tiny random model in bfloat16, its config)."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    config = config_of({"model_type": name.partition(" ")[0], **CONFIGS[name]})
    autos = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForCausalLM)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(config, dtype=torch.bfloat16).eval(), config


def inputs(config: Any, tokens: int, batch: int) -> dict[str, Any]:
    ids = torch.full((batch, tokens), 5)
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    if config.model_type == "whisper":
        heard = torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=torch.bfloat16)
        return {"input_features": heard, "decoder_input_ids": ids}
    return {"input_ids": torch.full((batch, SOURCE), 5), "decoder_input_ids": ids}


def held(cache: Any) -> int:
    """Bytes of every tensor in a transformers cache."""
    if hasattr(cache, "self_attention_cache"):
        return held(cache.self_attention_cache) + held(cache.cross_attention_cache)
    found: list[Any] = list(getattr(cache, "linear_cache", []))
    for layer in cache.layers:
        found += [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
        for states in ("conv_states", "recurrent_states"):
            found += list(getattr(layer, states, {}).values())
    return sum(t.nbytes for t in found if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dynamic_cache_is_counted_exactly(name):
    """After a prompt below, at and above the window, and after further steps."""
    model, config = made(name)
    arch = architecture(config.to_dict())
    setting = Setting(encoder_tokens=SOURCE)
    for tokens in (1, W - 1, W, W + 1, 21):
        with torch.no_grad():
            out = model(**inputs(config, tokens, 2), use_cache=True)
        cache = getattr(out, "past_key_values", None) or out.cache_params
        assert held(cache) == kv_bytes(arch, tokens, 2, setting=setting), tokens
    if not config.is_encoder_decoder and hasattr(out, "past_key_values"):
        with torch.no_grad():
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache, use_cache=True)
        assert held(cache) == kv_bytes(arch, 22, 2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss", "llama4_text", "qwen2 with windows"])
@pytest.mark.parametrize("room", [5, W, 30])
def test_a_static_cache_is_counted_exactly(name, room):
    from transformers import StaticCache

    model, config = made(name)
    cache = StaticCache(config=config, max_cache_len=room)
    with torch.no_grad():
        model(input_ids=torch.full((3, 4), 5), past_key_values=cache, use_cache=True)
    assert held(cache) == kv_bytes(architecture(config.to_dict()), room, 3, engine="static")


def test_states_that_a_model_keeps_outside_of_its_cache():
    """RecurrentGemma has them in its modules."""
    from transformers import DynamicCache

    config = config_of(
        {"model_type": "recurrent_gemma", **TINY, "num_hidden_layers": 6, "attention_window_size": W, "lru_width": 64}
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.full((2, 12), 5), past_key_values=cache, use_cache=True)
    states = [getattr(m, name, None) for m in model.modules() for name in ("conv1d_state", "recurrent_states")]
    found = kv(architecture(config.to_dict()), 12, 2)
    assert sum(s.nbytes for s in states if isinstance(s, torch.Tensor)) == found.by_kind["state"]


def of(name: str) -> Any:
    return architecture(PUBLISHED[name][0])


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("Llama-3.1-8B", 2 * 32 * 8 * 128 * 2),
        ("Llama-3.3-70B", 2 * 80 * 8 * 128 * 2),
        ("Qwen3-32B", 2 * 64 * 8 * 128 * 2),
        ("DeepSeek-V3", 61 * 576 * 2),
        ("Qwen3-Next-80B-A3B", 2 * 12 * 2 * 256 * 2),
    ],
)
def test_what_another_token_costs(name, per_token):
    for engine in ("transformers", "vllm", "llama.cpp"):
        at = [kv_bytes(of(name), n, engine=engine, setting=Setting(block=256)) for n in (2**14, 2**15)]
        assert (at[1] - at[0]) / 2**14 == pytest.approx(per_token, rel=0.03), engine  # pages with states are large


def test_the_type_of_the_cache_leaves_states_alone():
    found = [kv(of("Qwen3-Next-80B-A3B"), 4096, dtype=dtype).by_kind for dtype in ("BF16", "F8_E4M3")]
    assert found[1]["full"] * 2 == found[0]["full"]
    assert found[1]["state"] == found[0]["state"] > 0
    llama = of("Llama-3.1-8B")
    assert kv_bytes(llama, 1024, dtype="Q8_0") * 16 == kv_bytes(llama, 1024) * 8.5


def test_ranks_divide_heads_and_hold_what_cannot_be_divided():
    llama, deepseek = of("Llama-3.1-8B"), of("DeepSeek-V3")
    for engine in ("transformers", "vllm", "llama.cpp"):
        whole = kv_bytes(llama, 4096, engine=engine)
        for tp, share in ((2, 2), (8, 8), (16, 8), (64, 8)):
            assert kv_bytes(llama, 4096, engine=engine, setting=Setting(tp=tp)) == whole // share
        assert kv_bytes(deepseek, 4096, engine=engine, setting=Setting(tp=8)) == kv_bytes(deepseek, 4096, engine=engine)


def test_an_indexer_keeps_keys_of_its_own():
    given = PUBLISHED["DeepSeek-V3"][0] | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128}
    arch = architecture(given)
    assert kv_bytes(arch, 64) - kv_bytes(of("DeepSeek-V3"), 64) == 61 * 64 * 128 * 2
    assert kv_bytes(arch, 64, engine="vllm") - kv_bytes(of("DeepSeek-V3"), 64, engine="vllm") == 61 * 64 * 132


def test_pages_round_up_and_windows_need_one_more():
    llama, mistral = of("Llama-3.1-8B"), of("Mistral-7B")
    page = 16 * 2 * 8 * 128 * 2
    assert kv_bytes(llama, 17, 3, engine="vllm") == 3 * 32 * 2 * page
    setting = Setting(in_flight=2048)
    tokens = 4096 - 1 + 2048
    assert kv_bytes(mistral, 100_000, engine="vllm", setting=setting) == 32 * (-(-tokens // 16) + 1) * page


def test_groups_of_layers_share_a_pool():
    """Gemma 3: 52 sliding layers and 10 full ones are groups of 10; the last sliding one is padded."""
    page = 16 * 2 * 16 * 128 * 2
    sliding = -(-(1024 - 1 + 2048) // 16) + 1
    expected = 10 * page * (2048 * 16 // 16 + 6 * sliding)
    assert kv_bytes(of("Gemma-3-27B"), 2048 * 16, engine="vllm") == expected


def test_llama_cpp_rounds_to_cells():
    llama, gemma = of("Llama-3.1-8B"), of("Gemma-3-27B")
    assert kv_bytes(llama, 257, engine="llama.cpp") == kv_bytes(llama, 512)
    mistral = of("Mistral-7B")
    assert kv_bytes(mistral, 8192, engine="llama.cpp") == kv_bytes(llama, 8192, engine="llama.cpp")
    full, sliding = 2 * 16 * 128 * 2 * 10, 2 * 16 * 128 * 2 * 52
    assert kv_bytes(gemma, 8192, engine="llama.cpp") == full * 8192 + sliding * (1024 + 512)


def test_the_formula_can_be_read():
    found = kv(of("Gemma-3-27B"), 8192, 2)
    assert found.formula == (
        "batch 2 x (52 sliding layers x 1,023 tokens x 2 (K, V) x 16 KV heads x 128 dims x 2 bytes + "
        "10 layers x 8,192 tokens x 2 (K, V) x 16 KV heads x 128 dims x 2 bytes)"
    )
    assert found.total == sum(found.by_kind.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"engine": "sglang"}, "unknown engine"), ({"dtype": "INT4"}, "no type"), ({"tokens": 0}, "1 or more"),
     ({"batch": 0}, "1 or more")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given, message):
    with pytest.raises(QkitError, match=message):
        kv_bytes(of("Llama-3.1-8B"), **{"tokens": 8, **given})
