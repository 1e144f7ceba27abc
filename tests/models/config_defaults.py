"""Makes qkit/models/data/config_defaults.json: what transformers' config classes have where config.json says nothing.

    python tests/models/config_defaults.py        writes the file anew

Class defaults, not those of an instance: an instance has filled in what depends on other keys.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "qkit" / "models" / "data" / "config_defaults.json"
# What qkit.models.architecture reads.
KEYS = (
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads",
    "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "intermediate_size", "n_inner",
    "ffn_dim", "ffn_hidden_size", "d_ff", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "n_positions",
    "max_seq_len", "seq_length", "n_ctx", "context_length", "model_max_length", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern",
    "attention_chunk_size", "no_rope_layer_interval", "num_experts", "num_local_experts", "n_routed_experts",
    "moe_num_experts", "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts",
    "moe_intermediate_size", "expert_ffn_hidden_size", "n_shared_experts", "num_shared_experts",
    "moe_num_shared_experts", "shared_expert_intermediate_size", "shared_intermediate_size", "qkv_bias",
    "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "moe_layers", "interleave_moe_layer_step",
    "intermediate_size_mlp", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "use_bias",
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "use_qk_norm",
    "num_nextn_predict_layers",
)  # fmt: skip


def extract() -> dict[str, Any]:
    import transformers
    from transformers import CONFIG_MAPPING

    from qkit.models.architecture.families import FAMILIES

    found = {}
    for kind in sorted(FAMILIES):
        fields = {f.name: f for f in dataclasses.fields(CONFIG_MAPPING[kind])}
        values = {}
        for key in KEYS:
            field = fields.get(key)
            if field is None:
                continue
            value = field.default
            if value is dataclasses.MISSING:
                value = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value is not None:
                values[key] = list(value) if isinstance(value, tuple) else value
        found[kind] = values
    return {"transformers": transformers.__version__, "defaults": found}


def dump(found: dict[str, Any]) -> str:
    """One line a class."""
    rows = (f"    {json.dumps(kind)}: {json.dumps(values)}" for kind, values in found["defaults"].items())
    version = json.dumps(found["transformers"])
    return f'{{\n  "transformers": {version},\n  "defaults": {{\n' + ",\n".join(rows) + "\n  }\n}\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(dump(extract()), encoding="utf-8")
