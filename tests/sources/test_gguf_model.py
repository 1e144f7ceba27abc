"""GGUF -> folder -> plain transformers: the same logits as the model the file was made from."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
import gguf
import transformers
from gguf_files import base_keys, byte_vocab, convert, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import qkit
from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.sources.gguf import open_gguf
from qkit.sources.types import Source
from qkit.spec.dtypes import TensorMeta

TINY = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def build(cls, **options):
    torch.manual_seed(0)
    config = cls(**{**TINY, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases away from their neutral start: a wrong one must show.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name or "experts" in name:
                parameter.normal_(std=0.15)
    return model


def state(model, folder):
    """The state dict under the names of checkpoints: experts one by one."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def export(source: Source, folder):
    folder.mkdir()
    save_file({n: source.read(n) for n in source.names()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config))
    for sidecar in source.sidecars:
        (folder / sidecar.name).write_bytes(sidecar.read())
    return folder


def logits(model):
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def check_round_trip(model, arch, keys, tmp_path):
    tensors = convert(state(model, tmp_path / "original"), model.config, arch)
    path = write(tmp_path / "m.gguf", arch, base_keys(model.config) | keys, tensors)
    source = open_gguf(path, dtype="F32")
    folder = export(source, tmp_path / "exported")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder)("hi").input_ids
    return source, again


C = transformers
CASES = {
    "llama": (C.LlamaConfig, {}, "llama", {"rope.freq_base": 10000.0, "rope.dimension_count": 16}),
    "llama-bias": (C.LlamaConfig, {"attention_bias": True, "mlp_bias": True}, "llama", {}),
    "llama-untied-theta": (
        C.LlamaConfig,
        {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "llama",
        {"rope.freq_base": 5e5},
    ),
    "llama-linear": (
        C.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": (C.MistralConfig, {"sliding_window": 8}, "llama", {"attention.sliding_window": 8}),
    "mixtral": (
        C.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "llama",
        {"expert_count": 4, "expert_used_count": 2, "rope.freq_base": 1e6},
    ),
    "qwen2": (C.Qwen2Config, {"tie_word_embeddings": True}, "qwen2", {}),
    "qwen2-yarn": (
        C.Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6
            }
        },
        "qwen2",
        {
            "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen3": (C.Qwen3Config, {"head_dim": 32}, "qwen3", {"rope.freq_base": 1e4}),
    "qwen3moe": (
        C.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        "qwen3moe",
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "qwen2moe": (
        C.Qwen2MoeConfig,
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48, "norm_topk_prob": False,
        },
        "qwen2moe",
        {
            "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 48,
        },
    ),
    "gemma3": (
        C.Gemma3TextConfig,
        {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16},
        "gemma3",
        {"attention.sliding_window": 8, "rope.freq_base": 1e6},
    ),
    "gemma3-linear": (
        C.Gemma3TextConfig,
        {
            "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 16,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "gemma3",
        {
            "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    cls, options, arch, keys = CASES[case]
    check_round_trip(build(cls, **options), arch, keys, tmp_path)


@pytest.mark.parametrize("factor,context,high", [(8.0, 8192, 4.0), (32.0, 8192, 4.0), (16.0, 1024, 3.0)])
def test_llama3_scaling_comes_back_from_rope_freqs(factor, context, high, tmp_path):
    rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": context, "high_freq_factor": high}
    theta = 5e5
    model = build(
        transformers.LlamaConfig, rope_parameters=rope | {"rope_theta": theta}, head_dim=64,
        max_position_embeddings=131072,
    )  # fmt: skip
    inv_freq = model.model.rotary_emb.inv_freq.double()
    plain = theta ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    tensors = convert(state(model, tmp_path / "o"), model.config, "llama")
    tensors["rope_freqs.weight"] = (plain / inv_freq).float().numpy()
    path = write(tmp_path / "m.gguf", "llama", base_keys(model.config) | {"rope.freq_base": theta}, tensors)
    source = open_gguf(path, dtype="F32")
    assert source.config["rope_scaling"] == rope
    again = transformers.AutoModelForCausalLM.from_pretrained(export(source, tmp_path / "e"), dtype=torch.float32)
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(metadata keys, GGUF tensors) of a tiny llama."""
    model = build(transformers.LlamaConfig)
    tensors = convert(state(model, tmp_path_factory.mktemp("tiny")), model.config, "llama")
    return base_keys(model.config), tensors


def refused(tmp_path, tiny, match, keys=None, tensors=None, arch="llama", vocab=None):
    path = write(tmp_path / "bad.gguf", arch, tiny[0] | (keys or {}), tensors or tiny[1], vocab)
    with pytest.raises(QkitError, match=match) as caught:
        open_gguf(path)
    return caught.value


def test_refusals(tiny, tmp_path):
    def without(*names):
        return {k: v for k, v in tiny[1].items() if k not in names}

    assert "gemma3" in refused(tmp_path, tiny, "architecture 'rwkv7'", arch="rwkv7").hint
    refused(tmp_path, tiny, "2 tensors are missing.*blk.1.attn_k.weight",
            tensors=without("blk.1.attn_k.weight", "blk.1.ffn_down.weight"))  # fmt: skip
    refused(tmp_path, tiny, "blk.2.attn_norm.weight", keys={"block_count": 3})
    refused(tmp_path, tiny, "have no place.*blk.1.", keys={"block_count": 1})
    refused(tmp_path, tiny, "block_count is 4000000", keys={"block_count": 4000000})
    refused(tmp_path, tiny, "no token embedding", tensors=without("token_embd.weight") | {
        "token_embd.weight": tiny[1]["token_embd.weight"].reshape(-1, 8, 8)})  # fmt: skip
    refused(tmp_path, tiny, "blk.0.ffn_down.weight has the shape", keys={"feed_forward_length": 95})
    refused(tmp_path, tiny, "do not divide", keys={"attention.head_count_kv": 3})
    refused(tmp_path, tiny, "RoPE over 8 of 16", keys={"rope.dimension_count": 8})
    refused(tmp_path, tiny, "'longrope'", keys={"rope.scaling.type": "longrope"})
    refused(tmp_path, tiny, "differs between layers", keys={"attention.head_count": [4, 2]})
    refused(tmp_path, tiny, "not a Llama 3 scaling", tensors=tiny[1] | {
        "rope_freqs.weight": torch.linspace(1, 3, 8).numpy()})  # fmt: skip
    refused(tmp_path, tiny, "ggml type I32", tensors=tiny[1] | {
        "blk.0.attn_norm.weight": tiny[1]["blk.0.attn_norm.weight"].astype("int32")})  # fmt: skip
    refused(tmp_path, tiny, "tokenizer model 'bert'", vocab=byte_vocab(260) | {"model": "bert"})
    refused(tmp_path, tiny, "pre-tokenizer 'nope'", vocab=byte_vocab(260) | {"pre": "nope"})
    refused(tmp_path, tiny, "eos_token_id is 9999", vocab=byte_vocab(260) | {"eos_token_id": 9999})
    refused(tmp_path, tiny, "token_type has 3", vocab=byte_vocab(260) | {"token_type": [1, 1, 1]})


def test_quantized_tensors_and_names(tiny, tmp_path):
    """Q8_0 and Q4_0 in the file, bf16 out: equal to the oracle's values; natural order; metadata carried. What is
    stored as floats stays as it is."""
    kinds = {"ffn_gate": gguf.GGMLQuantizationType.Q8_0, "ffn_up": gguf.GGMLQuantizationType.Q4_0}
    tensors = {k: (v, kinds[k.split(".")[2]]) if k.split(".")[2:3] and k.split(".")[2] in kinds else v
               for k, v in tiny[1].items()}  # fmt: skip
    source = open_gguf(write(tmp_path / "q.gguf", "llama", tiny[0], tensors), base_model="org/name")
    assert source.base_model == "org/name"
    assert source.names()[:2] == ["lm_head.weight", "model.embed_tokens.weight"]
    for ours, name in (("gate", "ffn_gate"), ("up", "ffn_up")):
        packed = gguf.quants.quantize(tiny[1][f"blk.1.{name}.weight"], kinds[name])
        expected = torch.from_numpy(gguf.quants.dequantize(packed, kinds[name])).to(torch.bfloat16)
        got = source.read(f"model.layers.1.mlp.{ours}_proj.weight")
        assert torch.equal(got, expected) and got.is_contiguous()
    for name in source.names():
        meta, tensor = source.meta(name), source.read(name)
        quantized = name.endswith(("gate_proj.weight", "up_proj.weight"))
        assert meta == TensorMeta("BF16" if quantized else "F32", tuple(tensor.shape))
        assert tensor.dtype == (torch.bfloat16 if quantized else torch.float32)
    with pytest.raises(KeyError):
        source.meta("nope")


@pytest.mark.parametrize(("numpy_type", "dtype"), [(np.float16, "F16"), (np.float32, "F32")])
def test_floats_that_bfloat16_cannot_hold_are_kept(tiny, tmp_path, numpy_type, dtype):
    name = "blk.0.ffn_up.weight"
    fine = (1 + np.arange(tiny[1][name].size) % 1000 / 1024).astype(numpy_type).reshape(tiny[1][name].shape)
    source = open_gguf(write(tmp_path / "f.gguf", "llama", tiny[0], {**tiny[1], name: fine}))
    ours = "model.layers.0.mlp.up_proj.weight"
    assert source.meta(ours).dtype == dtype
    assert torch.equal(source.read(ours), torch.from_numpy(fine))
    qkit.convert(str(tmp_path / "f.gguf"), tmp_path / "out", format="safetensors")
    assert torch.equal(open_source(str(tmp_path / "out")).read(ours), torch.from_numpy(fine))


@pytest.fixture(scope="module")
def image(tiny, tmp_path_factory):
    """A valid file with many kinds of metadata, and a path to write damaged copies to."""
    folder = tmp_path_factory.mktemp("fuzz")
    keys = tiny[0] | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 1e4,
                      "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.5}  # fmt: skip
    return write(folder / "good.gguf", "llama", keys, tiny[1]).read_bytes(), folder / "bad.gguf"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_damaged_headers_are_read_or_refused(image, edits):
    """Overwritten header bytes: a QkitError, or a source that gives every tensor and every sidecar."""
    good, path = image
    raw = bytearray(good)
    for at, piece in edits:
        at %= 9000  # the header and the beginning of the data
        raw[at : at + len(piece)] = piece
    path.write_bytes(raw)
    try:
        source = open_gguf(path)
        assert source.sidecars
    except QkitError:
        return
    for name in source.names():
        assert source.read(name).shape == source.meta(name).shape


def test_changed_file_is_noticed(tiny, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", tiny[0], tiny[1])
    source = open_gguf(path)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(QkitError, match="changed"):
        source.read("model.norm.weight")


def test_fingerprint(tiny, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", tiny[0], tiny[1])
    assert open_gguf(path).fingerprint == open_gguf(path).fingerprint
    assert open_gguf(path).fingerprint != open_gguf(path, dtype="F32").fingerprint
    other = write(tmp_path / "o.gguf", "llama", tiny[0] | {"context_length": 256}, tiny[1])
    assert open_gguf(path).fingerprint != open_gguf(other).fingerprint
