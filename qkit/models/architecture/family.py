"""`Family`: what sets the models of one `model_type` apart from Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from . import kinds
from .attention import grouped
from .keys import Keys
from .mlp import Moe
from .part import Part, Place
from .types import Matrix

Flag = bool | str  # a constant, or the key of a config that says so
Mixer = Callable[[Keys, "Family", Place], Part]
Outside = Callable[[Keys, "Family"], tuple[tuple[Matrix, ...], int]]


@dataclass(frozen=True)
class Family:
    """Llama, but for what is given.

    embedding, layers, head  modules in files; more_rows: of the embedding, beyond the vocabulary
    attention, qkv, out      the attention's module and its linears; one name in qkv: they are one matrix
    qkv_bias, out_bias       None: as qkv_bias
    qk_norm                  "head": a weight for each dim of a head; "heads": of all heads; "": none; qk_norm_if: a key
    sinks                    one value for each head; gated_queries: q_proj makes a gate too; own_values: `v_head_dim`
    mlp, ffn, gated          the MLP's module and its linears, the last one down; gated: two may stand for three
    four_times               an MLP without a width is four times as wide as the model
    norms, norm              of each layer; "rms" has a weight, "layer" a bias too, "": neither. norm_bias: a key
    rule                     what layers attend to where the config does not say
    kv_heads                 where `num_key_value_heads` is not all
    mixer, mixers            what takes the place of attention: everywhere, or by kind of layer
    single                   kinds of layers that are their mixer alone, with one norm
    moe                      experts, where there are some
    width                    of an MLP: a key, or how it is worked out; embedding_width: a key, where it is narrower
    extra                    anything else of a layer; outside: of the model
    tied                     where neither config nor class says
    head_bias                of the head; final_norm: after the last layer
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    head: str = "lm_head"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    qkv_bias: Flag = "attention_bias"
    out_bias: Flag | None = None
    qk_norm: str = ""
    qk_norm_if: Flag = True
    qk_norm_bias: bool = False
    sinks: bool = False
    gated_queries: bool = False
    own_values: bool = False
    mlp: str = "mlp"
    ffn: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    gated: bool = True
    mlp_bias: Flag = "mlp_bias"
    four_times: bool = False
    norms: int | Callable[[Keys], int] = 2
    norm: str = "rms"
    norm_bias: Flag = True
    rule: kinds.Kinds = kinds.uniform
    kv_heads: Callable[[Keys], int] | None = None
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    mixer: Mixer = grouped
    single: tuple[str, ...] = ()
    moe: Moe | None = None
    width: str | Callable[[Keys, Place], int] = "intermediate_size"
    embedding_width: str = "hidden_size"
    more_rows: int = 0
    extra: Mixer | None = None
    outside: Outside | None = None
    tied: bool = False
    head_bias: Flag = False
    final_norm: bool = True

    def norm_count(self, k: Keys) -> int:
        return self.norms(k) if callable(self.norms) else self.norms

    def norm_values(self, k: Keys, width: int) -> int:
        """Values of one norm."""
        if not self.norm:
            return 0
        return width * (2 if self.norm == "layer" and k.flag(self.norm_bias) else 1)
