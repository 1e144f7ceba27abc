"""What vLLM itself counts for the KV cache of a request, and what llama.cpp makes, against `qkit.estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interop import clients

from qkit.estimate.cache import Setting, kv_bytes
from qkit.models.architecture import architecture
from qkit.sources import open_source
from qkit.spec.dtypes import named_dtype
from qkit.spec.ggml import GGML

TINY = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
DIM = TINY | {"head_dim": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1}
# name -> (model_type, class, config, tokens of a page on a CPU)
MODELS = {
    "full": ("llama", "LlamaForCausalLM", DIM, 128),
    "sliding": ("mistral", "MistralForCausalLM", DIM | {"sliding_window": 128}, 128),
    "five to one": ("gemma3_text", "Gemma3ForCausalLM", DIM | {"sliding_window": 128, "num_hidden_layers": 14}, 128),
    "one to one": (
        "gpt_oss", "GptOssForCausalLM",
        DIM | {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 8}, 128,
    ),
    "chunked": (
        "llama4_text", "Llama4ForCausalLM",
        DIM | {"attention_chunk_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 4,
               "num_experts_per_tok": 1, "num_hidden_layers": 8}, 128,
    ),
    "latent": (
        "deepseek_v2", "DeepseekV2ForCausalLM",
        TINY | {"num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1,
                "topk_method": "greedy", "scoring_func": "softmax"}, 16,
    ),
    "mamba": (
        "mamba2", "Mamba2ForCausalLM",
        {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "state_size": 32, "num_heads": 4,
         "head_dim": 64, "n_groups": 1}, 128,
    ),
    "hybrid": (
        "granitemoehybrid", "GraniteMoeHybridForCausalLM",
        TINY | MAMBA | {"layer_types": ["mamba", "mamba", "attention"] * 2, "num_local_experts": 0,
                        "shared_intermediate_size": 64}, 128,
    ),
    "side by side": ("falcon_h1", "FalconH1ForCausalLM", DIM | MAMBA | {"mamba_d_ssm": 256}, 128),
    "delta rule": (
        "qwen3_next", "Qwen3NextForCausalLM",
        DIM | {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
               "linear_value_head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
               "shared_expert_intermediate_size": 64}, 128,
    ),
}  # fmt: skip
TOKENS = [1, 100, 128, 129, 1000, 4096]


@pytest.fixture(scope="session")
def counted(tmp_path_factory):
    """() -> name -> (config.json, what vLLM says of it)."""
    return clients.once(lambda: _counted(tmp_path_factory.mktemp("kv")))


def _counted(root):
    from transformers import CONFIG_MAPPING

    for name, (kind, architecture_, config, _) in MODELS.items():
        made = CONFIG_MAPPING[kind](**config)
        made.architectures, made.dtype = [architecture_], "bfloat16"
        made.save_pretrained(root / name)
    job = {"folders": {name: str(root / name) for name in MODELS}, "tokens": TOKENS, "out": str(root)}
    clients.run("vllm", job, root, "client_vllm_cache.py")
    found = json.loads((root / "cache.json").read_text())
    return {name: (json.loads((root / name / "config.json").read_text()), found[name]) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_request_in_vllm(name: str, counted) -> None:
    config, theirs = counted()[name]
    recurrent = named_dtype(theirs["recurrent_dtype"])  # None of "auto", where states have the model's own
    setting = Setting(block=MODELS[name][3], in_flight=theirs["in_flight"], recurrent_dtype=recurrent)
    arch = architecture(config)
    ours = {str(tokens): kv_bytes(arch, tokens, engine="vllm", setting=setting) for tokens in TOKENS}
    assert ours == theirs["bytes"]


# (tokens, sequences, n_ubatch, type of the cache)
LLAMA_CPP = [
    (300, 1, 512, "F16"), (512, 1, 512, "F16"), (2048, 1, 512, "F16"), (4096, 1, 128, "F16"), (2048, 3, 512, "F16"),
    (2048, 1, 512, "Q8_0"),
]  # fmt: skip


def test_sequences_in_llama_cpp(tmp_path) -> None:
    """Gemma 3 270M: 15 layers with a window of 512 and 3 without."""
    gemma = str(clients.once(clients.gemma)())
    settings = [[tokens, batch, ubatch, GGML[kind].number] for tokens, batch, ubatch, kind in LLAMA_CPP]
    job = {"model": gemma, "settings": settings, "out": str(tmp_path / "found.json")}
    clients.once(lambda: clients.run("llamacpp", job, tmp_path, "client_llamacpp_cache.py"))()
    arch = architecture(open_source(gemma).config)
    for (tokens, batch, ubatch, kind), theirs in zip(LLAMA_CPP, json.loads(Path(job["out"]).read_text()), strict=True):
        ours = kv_bytes(arch, tokens, batch, kind, "llama.cpp", Setting(ubatch=ubatch))
        assert ours / 2**20 == pytest.approx(sum(theirs), abs=0.01), (tokens, batch, ubatch, kind)
