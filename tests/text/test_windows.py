"""Text -> token windows: exactly the tokens of the whole text, BOS, and every refusal."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest
import torch

from qkit.errors import QkitError
from qkit.text import defaults as texts
from qkit.text import windows as text


def tokenizer(bos: bool):
    """A byte-pair tokenizer trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([texts.calibration_text().text[:40_000]], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def plain():
    return tokenizer(bos=False)


@pytest.fixture(scope="module")
def with_bos():
    return tokenizer(bos=True)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(texts.evaluation_text().text[:120_000], encoding="utf-8")
    return path


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (3, 7), (16, 64), (5, 513)])
def test_windows_are_the_tokens_of_the_whole_text(plain, corpus, samples, length):
    got = text.calibration_tokens(str(corpus), plain, samples, length)
    content = corpus.read_text(encoding="utf-8")
    whole = plain(content, add_special_tokens=False)["input_ids"]
    assert got.tokens.dtype == torch.int64 and got.tokens.shape == (samples, length)
    assert got.tokens.flatten().tolist() == whole[: samples * length]
    assert not got.bos and got.note == "" and got.name == text.LOCAL
    assert got.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_bos_replaces_the_first_token_of_each_window(plain, with_bos, corpus):
    got = text.calibration_tokens(str(corpus), with_bos, 4, 32)
    reference = text.calibration_tokens(str(corpus), plain, 4, 32)
    assert got.bos and got.tokens[:, 0].tolist() == [0, 0, 0, 0]
    assert torch.equal(got.tokens[:, 1:], reference.tokens[:, 1:])


def test_the_sketch_knows_the_text_that_was_used_and_not_the_rest(plain, corpus):
    content = corpus.read_text(encoding="utf-8")
    got = text.calibration_tokens(str(corpus), plain, 4, 64)
    assert texts.overlap(got.sketch, content[:400]).count > 0
    assert texts.overlap(got.sketch, content[60_000:]).count == 0


def test_the_default_text_gives_what_it_has_and_says_so(plain):
    few = text.calibration_tokens(None, plain, 8, 32)
    assert few.tokens.shape == (8, 32) and few.name == texts.calibration_text().name and few.note == ""
    many = text.calibration_tokens(None, plain, 10**6, 512)
    assert 1 < len(many.tokens) < 10**6 and str(len(many.tokens)) in many.note


def test_too_little_text_is_refused_with_the_count(plain, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("hello world, this is short")
    count = len(plain("hello world, this is short")["input_ids"])
    with pytest.raises(QkitError, match=f"has {count} tokens; 8 x 512 = 4096 are needed"):
        text.calibration_tokens(str(path), plain, 8, 512)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_senseless_sizes(plain, samples, length):
    with pytest.raises(QkitError, match="at least 1 sample"):
        text.calibration_tokens(None, plain, samples, length)


def test_jsonl_of_text_and_messages(plain, tmp_path):
    rows = [
        {"text": "first document"},
        {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]},
    ]
    body = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path = tmp_path / "data.jsonl"
    path.write_text(body)
    assert text.read_text(str(path), plain).text == "first document\n\nquestion\nanswer\n"
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(body.encode()))
    assert text.read_text(str(packed), plain).text == "first document\n\nquestion\nanswer\n"

    chat = tokenizer(bos=False)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
    assert text.read_text(str(path), chat).text == "first document\n\n[user] question;[assistant] answer;\n"
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QkitError, match=r"line 2.*roles must alternate"):
        text.read_text(str(path), chat)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.txt", b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        ("empty.txt", b" \n", "holds no text"),
        ("bad.jsonl", b'{"text": "ok"}\n{"text', "line 2: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("row.jsonl", b'{"prompt": "x"}', "line 1: neither"),
        ("chat.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: neither"),
        ("list.jsonl", b'["text"]', "line 1: neither"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}')[:-9], "cannot be decompressed"),
        ("not.jsonl.gz", b"plain", "cannot be decompressed"),
    ],
)
def test_bad_files(plain, tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QkitError, match=message):
        text.read_text(str(path), plain)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert text.read_text(str(path)).text == "hello"


@pytest.mark.parametrize("spec", ["/no/such/file", "missing.txt", "./a/b", "a/b/c", "dir/file.jsonl"])
def test_a_missing_file_is_not_looked_up_on_the_hub(spec):
    with pytest.raises(QkitError, match="no such text file"):
        text.read_text(spec)


def test_a_folder(tmp_path):
    with pytest.raises(QkitError, match="is a folder"):
        text.read_text(str(tmp_path))


class _Info:
    def __init__(self, *names):
        self.siblings = [type("Sibling", (), {"rfilename": name}) for name in names]


def test_a_hub_data_set(monkeypatch, tmp_path):
    import huggingface_hub

    local = tmp_path / "train.jsonl"
    local.write_text('{"text": "from the hub"}')
    asked = []

    def download(spec, name, repo_type):
        asked.append((spec, name, repo_type))
        return str(local)

    info = _Info("README.md", "a-test.jsonl", "data/train.jsonl")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, spec, timeout: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    got = text.read_text("org/data")
    assert got.text == "from the hub\n" and got.name == "org/data/data/train.jsonl"
    assert asked == [("org/data", "data/train.jsonl", "dataset")]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, spec, timeout: _Info("x.arrow"))
    with pytest.raises(QkitError, match="no file that can be read"):
        text.read_text("org/data")


def test_no_network(monkeypatch):
    import huggingface_hub

    def fail(self, spec, timeout):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(QkitError, match="Name or service not known") as caught:
        text.read_text("org/data")
    assert "--calib FILE" in (caught.value.hint or "")
