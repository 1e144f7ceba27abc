"""Encoder-decoders: T5, BART, Whisper and what is built like them. The encoder stands among the towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .keys import MOST_LAYERS, Keys
from .part import Part, linears
from .types import FAMILY, Architecture, Cache, Matrix


def _kept(kind: str, heads: int, dim: int, window: int | None = None) -> Cache:
    values = 2 * heads * dim
    return Cache(kind, values, values, window, kv_heads=heads, head_dim=dim)


def _idle(part: Part) -> tuple[Matrix, ...]:
    """What runs once a prompt, not once a token."""
    return tuple(replace(m, active=0) for m in part.matrices)


def t5(k: Keys) -> Architecture:
    hidden, vocab = k.size("d_model"), k.size("vocab_size")
    heads, dim, wide = k.size("num_heads", most=1 << 20), k.size("d_kv"), k.size("d_ff")
    below = k.size("num_layers", most=MOST_LAYERS)
    above = k.size("num_decoder_layers", below, most=MOST_LAYERS)
    gated = str(k.get("feed_forward_proj") or "relu").startswith("gated")
    ups = ("wi_0", "wi_1") if gated else ("wi",)
    everywhere = k.model_type == "umt5"  # where each layer has positions of its own
    buckets = k.size("relative_attention_num_buckets", 32) * heads

    def attention(stem: str) -> Part:
        part = linears(stem, "attention", *((name, heads * dim, hidden) for name in "qkv"))
        return part + linears(stem, "attention", ("o", hidden, heads * dim))

    def mlp(stem: str) -> Part:
        return linears(stem, "mlp", *((name, wide, hidden) for name in ups), ("wo", hidden, wide))

    encoder, layers = Part((), hidden), []
    for i in range(below):
        stem = f"encoder.block.{i}.layer"
        encoder += attention(f"{stem}.0.SelfAttention") + mlp(f"{stem}.1.DenseReluDense")
        encoder += Part((), 2 * hidden + (buckets if everywhere or i == 0 else 0))
    for i in range(above):
        stem = f"decoder.block.{i}.layer"
        part = attention(f"{stem}.0.SelfAttention") + attention(f"{stem}.1.EncDecAttention")
        part += mlp(f"{stem}.2.DenseReluDense")
        caches = (_kept("full", heads, dim), _kept("cross", heads, dim))
        small = 3 * hidden + (buckets if everywhere or i == 0 else 0)
        layers.append((part + Part((), small, caches, heads, dim, dim)).layer())
    return Architecture(
        k.model_type, FAMILY, tuple(layers), hidden, wide, vocab, k.size("n_positions", 0, least=0) or None,
        Matrix("shared", vocab, hidden, "embedding", active=0),
        None if k.flag("tie_word_embeddings", True) else Matrix("lm_head", vocab, hidden, "head"),
        towers=_idle(encoder), towers_vectors=encoder.vectors, vectors=hidden,
    )  # fmt: skip


def bart(k: Keys) -> Architecture:
    """BART and Whisper. Keys of Whisper's attention have no bias, its encoder hears, its positions are not offset."""
    hears = k.model_type == "whisper"
    hidden, vocab = k.size("d_model"), k.size("vocab_size")
    below, above = k.size("encoder_layers", most=MOST_LAYERS), k.size("decoder_layers", most=MOST_LAYERS)
    heads = k.size("decoder_attention_heads", most=1 << 20)
    dim = max(1, hidden // heads)
    norm = 2 * hidden

    def attention(stem: str) -> Part:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        part = linears(stem, "attention", *((name, hidden, hidden) for name in names), bias=True)
        return part + Part((), norm - (hidden if hears else 0))

    def mlp(stem: str, wide: int) -> Part:
        return linears(stem, "mlp", ("fc1", wide, hidden), ("fc2", hidden, wide), bias=True) + Part((), norm)

    encoder = Part((), norm)
    for i in range(below):
        stem = f"model.encoder.layers.{i}"
        encoder += attention(f"{stem}.self_attn") + mlp(stem, k.size("encoder_ffn_dim"))
    layers, seen = [], k.size("max_source_positions") if hears else None
    for i in range(above):
        stem = f"model.decoder.layers.{i}"
        part = attention(f"{stem}.self_attn") + attention(f"{stem}.encoder_attn") + mlp(stem, k.size("decoder_ffn_dim"))
        caches = (_kept("full", heads, dim), _kept("cross", heads, dim, seen))
        layers.append((part + Part((), 0, caches, heads, dim, dim)).layer())
    if hears:
        longest = k.size("max_target_positions")
        tables = (longest, k.size("max_source_positions"))
        ears = linears("model.encoder", "tower", ("conv1", hidden, 3 * k.size("num_mel_bins")), bias=True)
        encoder += ears + linears("model.encoder", "tower", ("conv2", hidden, 3 * hidden), bias=True)
    else:
        longest = k.size("max_position_embeddings")
        tables = (longest + 2, longest + 2)
    encoder += Part((Matrix("model.encoder.embed_positions", tables[1], hidden, "tower"),))
    positions = Matrix("model.decoder.embed_positions", tables[0], hidden, "embedding", active=0)
    name = "model.decoder.embed_tokens" if hears else "model.shared"
    last = norm * (2 if k.model_type == "mbart" else 1)
    return Architecture(
        k.model_type, FAMILY, tuple(layers), hidden, k.size("decoder_ffn_dim"), vocab, longest,
        Matrix(name, vocab, hidden, "embedding", active=0),
        None if k.flag("tie_word_embeddings", True) else Matrix("lm_head", vocab, hidden, "head"),
        (positions,), _idle(encoder), encoder.vectors + last - norm, vectors=last,
    )  # fmt: skip


ENCODERS: dict[str, Callable[[Keys], Architecture]] = {
    "t5": t5, "mt5": t5, "umt5": t5, "bart": bart, "mbart": bart, "whisper": bart,
}  # fmt: skip
