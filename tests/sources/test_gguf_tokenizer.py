"""Tokenizers rebuilt from GGUF metadata: ids against hand-made expectations, SentencePiece and real vocabularies."""

import json

import pytest
from gguf_files import BYTES
from tokenizers import Tokenizer, decoders, pre_tokenizers

from qkit.errors import QkitError
from qkit.sources.gguf import tokenizer as gguf_tokenizer

CONFIG = {"max_position_embeddings": 64, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}


def sidecars(arch: str = "llama", **vocab) -> dict[str, bytes]:
    metadata = {"general.architecture": arch} | {f"tokenizer.ggml.{k}": v for k, v in vocab.items()}
    if "chat_template" in vocab:
        metadata["tokenizer.chat_template"] = vocab["chat_template"]
    gguf_tokenizer.check(metadata, arch, CONFIG["vocab_size"], "m.gguf")
    files = {s.name: s.read() for s in gguf_tokenizer.build(metadata, CONFIG, "m.gguf")}
    assert files == {s.name: s.read() for s in gguf_tokenizer.build(metadata, CONFIG, "m.gguf")}
    return files


def tokenizer(arch: str = "llama", **vocab) -> Tokenizer:
    return Tokenizer.from_str(sidecars(arch, **vocab)["tokenizer.json"].decode())


def byte_level(pre: str, extra=(), merges=(), **more):
    tokens = [*BYTES, *extra, "<|end|>", "<tool call>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges), **more}


def sentencepiece(pieces, scores=None, types=None, **more):
    """<unk> <s> </s>, 256 bytes, then pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(scores or (-float(i) for i in range(len(pieces)))),
        "token_type": [2, 3, 3] + [6] * 256 + list(types or [1] * len(pieces)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_round_trips_any_text(pre):
    tok = tokenizer(**byte_level(pre))
    for text in ("", " a  b\n\n\tc", "naïve café 東京 😀👍🏽", "x" * 50, "don't 12345", "\x00\x7f\u200b"):
        assert tok.decode(tok.encode(text).ids) == text
    ids = tok.encode("a<|end|>b<tool call>").ids
    assert ids[1] == 256 and ids[3] == 257 and len(ids) == 4
    assert tok.decode(ids) == "ab<tool call>"  # only the control token is special


@pytest.mark.parametrize(
    "pre,words",
    [
        ("gpt-2", ["Ġ", "Ġ1234", "'s", "Ġx"]),
        ("smollm", ["ĠĠ", "1", "2", "3", "4", "'s", "Ġx"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "4", "'s", "Ġx"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4", "'s", "Ġx"]),
    ],
)
def test_pre_tokenizers_split_as_the_models_do(pre, words):
    tok = tokenizer(**byte_level(pre))
    assert [word for word, _ in tok.pre_tokenizer.pre_tokenize_str("  1234's x")] == words


def test_merges_and_whole_words():
    merges = {"extra": ["he", "ll", "hell", "hello"], "merges": ["h e", "l l", "he ll"]}
    assert tokenizer(**byte_level("gpt-2", **merges)).encode("hello").tokens == ["hell", "o"]
    # Llama 3 looks whole words up first, whatever the merges say.
    assert tokenizer(**byte_level("llama-bpe", **merges)).encode("hello").tokens == ["hello"]


def test_qwen_normalizes():
    tok = tokenizer("qwen2", **byte_level("qwen2"))
    assert tok.encode("e\u0301").ids == tok.encode("\u00e9").ids


def test_sentencepiece_follows_the_scores():
    """ab before bc: the better score wins although both are possible; unknown characters fall back to bytes."""
    pieces = ["▁", "a", "b", "c", "bc", "ab", "▁a"]
    better_ab = sentencepiece(pieces, scores=[-10.0, -11.0, -12.0, -13.0, -3.0, -2.0, -4.0])
    better_bc = sentencepiece(pieces, scores=[-10.0, -11.0, -12.0, -13.0, -2.0, -3.0, -4.0])
    assert tokenizer(**better_ab).encode("abc", add_special_tokens=False).tokens == ["▁", "ab", "c"]
    assert tokenizer(**better_bc).encode("abc", add_special_tokens=False).tokens == ["▁a", "bc"]
    tok = tokenizer(**better_ab)
    assert tok.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tok.decode(tok.encode("aé b").ids) == "aé b"


def test_space_prefix_and_bos_eos():
    pieces = ["▁", "a", "▁a"]
    assert tokenizer(**sentencepiece(pieces)).encode("a").tokens == ["<s>", "▁a"]
    plain = tokenizer(**sentencepiece(pieces, add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert plain.encode("a").tokens == ["a", "</s>"]
    assert plain.decode(plain.encode(" a").ids) == " a"
    assert plain.encode("a", "a").type_ids == [0, 0, 1, 1]


def test_gemma_spaces_and_newlines():
    pieces = ["▁", "\n", "\n\n", "  ", "   ", "a", "▁a"]
    vocab = sentencepiece(pieces, scores=[-1000.0] * 7, types=[1, 4, 4, 4, 4, 1, 1], add_bos_token=True)
    tok = tokenizer("gemma3", **vocab)
    assert tok.encode("a\n\n\na").tokens == ["<s>", "a", "\n\n", "\n", "a"]
    assert tok.encode("   a").tokens == ["<s>", "▁▁▁", "a"]
    assert tok.encode(" a").tokens == ["<s>", "▁a"]
    assert tok.decode(tok.encode("   a\n\n  a").ids) == "   a\n\n  a"


def test_companion_files():
    files = sidecars(**byte_level("gpt-2", bos_token_id=256, eos_token_id=256, eot_token_id=257, chat_template="{{x}}"))
    assert files["chat_template.jinja"] == b"{{x}}"
    assert json.loads(files["special_tokens_map.json"]) == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    config = json.loads(files["tokenizer_config.json"])
    assert config["eos_token"] == "<|end|>" and config["add_bos_token"] is False
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [256, 257]


@pytest.mark.parametrize(
    "vocab,message",
    [
        (byte_level("gpt-2") | {"merges": ["a"]}, "the merge 'a'"),
        (byte_level("gpt-2") | {"merges": ["a b"]}, "the merge 'a b'"),
        (byte_level("gpt-2") | {"tokens": ["a"] * 258}, "'a' appears twice"),
        (byte_level("gpt-2") | {"token_type": None}, "token_type is missing"),
        (byte_level("gpt-2") | {"merges": "a b"}, "merges is missing or not an array"),
        (byte_level("gpt-2") | {"tokens": ["a"] * 1001}, "1001 tokens in the vocabulary"),
        (sentencepiece(["a"]) | {"scores": (1.0,)}, "scores has 1 values"),
        (sentencepiece(["a"]) | {"bos_token_id": -1}, "bos_token_id is -1"),
        (sentencepiece(["a"]) | {"model": "t5"}, "'t5' is not supported"),
    ],
)
def test_refusals(vocab, message):
    with pytest.raises(QkitError, match=message):
        sidecars(**vocab)


def test_derived_merges_equal_sentencepiece(tmp_path):
    """A trained SentencePiece BPE model, written as GGUF stores it: the same ids as SentencePiece itself."""
    sp = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "text.txt"
    words = [a + b for a in ("re", "un", "in", "pre", "co") for b in ("do", "act", "form", "view", "port", "ing")]
    corpus.write_text("\n".join(" ".join(words[i::7]) + f" {i} été 東京" for i in range(60)))
    sp.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "sp"), vocab_size=340, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    model = sp.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(len(model))
    ]
    vocab = {
        "model": "llama", "tokens": pieces, "scores": [model.get_score(i) for i in range(len(model))],
        "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    tok = tokenizer(**vocab)
    for text in ("undo the report", "preview coact", "x é 京 😀", "informing reporting unformed preport"):
        assert tok.encode(text, add_special_tokens=False).ids == model.encode(text)
        assert tok.decode(tok.encode(text).ids) == text


def test_demo_model():
    """The real SmolLM2 vocabulary: known ids, whole special tokens, digits one by one."""
    from qkit.sources.demo import demo_path
    from qkit.sources.gguf import open_gguf

    try:
        path = demo_path()
    except QkitError:
        pytest.skip("the demo model is not installed")
    source = open_gguf(path)
    files = {s.name: s.read() for s in source.sidecars}
    assert source.config["model_type"] == "llama" and source.config["rms_norm_eps"] == 1e-5
    assert {"chat_template.jinja", "generation_config.json", "tokenizer_config.json"} <= files.keys()
    tok = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tok.encode("<|im_start|>x<|im_end|><|endoftext|>").ids == [1, tok.token_to_id("x"), 2, 0]
    assert tok.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    reference = Tokenizer.from_str(files["tokenizer.json"].decode())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = decoders.ByteLevel()
    for text in ("def f(x):\n    return x  # 12  3.5", "naïve 東京 😀\r\n\t\tz", "   lead and trail   "):
        assert tok.encode(text).ids == reference.encode(text).ids
        assert tok.decode(tok.encode(text).ids) == text
