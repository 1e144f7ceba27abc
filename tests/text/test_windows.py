"""Text -> token windows: exactly the tokens of the whole text, BOS, and every refusal."""

from __future__ import annotations

import gzip
import hashlib
import json
import random

import pytest
import torch

from qkit.errors import QkitError
from qkit.measure.evaluation import MOST_SHARED
from qkit.text import read, windows
from qkit.text.defaults import calibration_text, evaluation_text
from qkit.text.sketch import overlap
from qkit.text.windows import calibration_tokens


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
    core.train_from_iterator([calibration_text().content[:40_000]], trainer)
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
    path.write_text(evaluation_text().content[:120_000], encoding="utf-8")
    return path


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (3, 7), (16, 64), (5, 513)])
def test_consecutive_windows_are_the_tokens_of_the_whole_text(plain, corpus, samples, length):
    content = corpus.read_text(encoding="utf-8")
    whole = plain(content, add_special_tokens=False)["input_ids"]
    tokens, prefix, bos = windows.token_windows(read.read_text(str(corpus)), plain, samples, length)
    assert tokens.dtype == torch.int64 and tokens.shape == (samples, length) and not bos
    assert tokens.flatten().tolist() == whole[: samples * length]
    assert len(plain(content[:prefix])["input_ids"]) >= samples * length


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (3, 7), (16, 64), (5, 513)])
def test_calibration_windows_come_from_all_over_the_text(plain, corpus, samples, length):
    got = calibration_tokens(str(corpus), plain, samples, length)
    content = corpus.read_text(encoding="utf-8")
    assert got.tokens.dtype == torch.int64 and got.tokens.shape == (samples, length)
    assert not got.bos and got.note == "" and got.name == read.LOCAL
    assert got.sha256 == hashlib.sha256(content.encode()).hexdigest()
    stretch = len(content) // samples
    places = [content.find(plain.decode(row), i * stretch) for i, row in enumerate(got.tokens)]
    assert all(i * stretch <= place < (i + 1) * stretch for i, place in enumerate(places)), places
    assert torch.equal(calibration_tokens(str(corpus), plain, samples, length).tokens, got.tokens)


def test_a_text_with_just_enough_tokens_is_used_whole(plain, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(calibration_text().content[:3000])
    whole = plain(path.read_text(), add_special_tokens=False)["input_ids"]
    for samples in (1, 6):
        length = len(whole) // samples
        got = calibration_tokens(str(path), plain, samples, length)
        assert got.tokens.shape == (samples, length) and got.note == ""
        assert overlap(got.sketch, path.read_text()).fraction > 0.8


def test_a_text_of_uneven_density_is_not_taken_from_its_head_alone(plain, tmp_path):
    """Digits are a token each, words are not: equal stretches of words hold too few tokens for their windows."""
    rng = random.Random(3)
    digits = "".join(f"{rng.randrange(10**9):09d}\n" for _ in range(5000))
    words = "".join(f"which is the {name} of the statement\n" * 1500 for name in ("alpha", "omega"))
    path = tmp_path / "uneven.txt"
    path.write_text(digits + words)
    length = int(1.1 * len(plain(words)["input_ids"]) / len(words) * len(digits + words) / 64)
    got = calibration_tokens(str(path), plain, 64, length)
    assert got.tokens.shape == (64, length)
    text = plain.decode(got.tokens.flatten())
    assert text.count("alpha") > 500 and text.count("omega") > 500 and sum(map(text.count, "0123456789")) > 10_000


def chats(path, contents):
    rows = ({"messages": [{"role": "user", "content": text}]} for text in contents)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def some_words(seed, count=60):
    rng = random.Random(seed)
    return " ".join(rng.choice("abcdefghij") + str(rng.randrange(9999)) for _ in range(count))


@pytest.fixture(scope="module")
def chat():
    made = tokenizer(bos=False)
    system = "You are a helpful assistant. " * 20
    made.chat_template = "<|system|>" + system + "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    return made


def test_documents_are_drawn_from_the_whole_file(chat, plain, tmp_path):
    """A file whose second half is of another topic."""
    rows = [{"text": ("alpha " if i < 500 else "omega ") * 50} for i in range(1000)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    got = calibration_tokens(str(tmp_path / "d.jsonl"), plain, 16, 64)
    text = plain.decode(got.tokens.flatten())
    assert 0.2 < text.count("alpha") / (text.count("alpha") + text.count("omega")) < 0.8


def test_one_long_document_does_not_take_all_windows(plain, tmp_path):
    rows = [{"text": "alpha " * 100_000}, *({"text": f"omega {i} " * 40} for i in range(200))]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for samples in (16, 32):
        text = plain.decode(calibration_tokens(str(tmp_path / "d.jsonl"), plain, samples, 64).tokens.flatten())
        assert text.count("omega") > text.count("alpha")


@pytest.mark.parametrize(("samples", "length"), [(64, 64), (8, 64), (6, 300)])
def test_a_few_long_documents_all_give_windows(plain, tmp_path, samples, length):
    names = ("alpha", "beta", "gamma", "delta", "omega", "sigma")
    rows = [{"text": "".join(f"{name} number {i}\n" for i in range(20_000))} for name in names]
    path = tmp_path / "books.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    got = calibration_tokens(str(path), plain, samples, length)
    counts = [plain.decode(got.tokens.flatten()).count(name) for name in names]
    assert min(counts) > 0.5 * max(counts), counts


def test_of_a_long_document_the_sketch_knows_the_part_that_was_used(plain, tmp_path):
    rng = random.Random(5)
    books = ["".join(some_words(rng.random(), 12) + "\n" for _ in range(3000)) for _ in range(3)]
    path = tmp_path / "books.jsonl"
    path.write_text("\n".join(json.dumps({"text": book}) for book in books))
    got = calibration_tokens(str(path), plain, 8, 256)
    assert overlap(got.sketch, plain.decode(got.tokens.flatten())).fraction > 0.9
    share = got.tokens.numel() / sum(len(plain(book)["input_ids"]) for book in books)
    assert overlap(got.sketch, "\n".join(books)).fraction < 1.5 * share
    text = read.read_text(str(path))
    _, prefix, _ = windows.token_windows(text, plain, 8, 256)
    assert len(plain(text.words(prefix))["input_ids"]) == pytest.approx(8 * 256, abs=2)


def test_a_tokenizer_without_offsets_gives_the_same_windows(plain, corpus, tmp_path):
    class Slow:
        is_fast = False
        bos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": plain(text, **options)["input_ids"]}

    rows = [{"text": part} for part in corpus.read_text().split("\n\n")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for spec, samples, length in ((corpus, 8, 64), (corpus, 60, 700), (tmp_path / "d.jsonl", 8, 256)):
        slow, fast = (calibration_tokens(str(spec), each, samples, length) for each in (Slow(), plain))
        assert torch.equal(slow.tokens, fast.tokens)
        assert overlap(slow.sketch, plain.decode(fast.tokens.flatten())).fraction > 0.5


def test_a_system_prompt_that_two_chat_sets_share_is_no_copy(plain, tmp_path):
    prompt = some_words(7)

    def dialogues(name, seed):
        said = ([prompt, some_words(f"{seed} {i}", 80)] for i in range(200))
        rows = ([{"role": r, "content": c} for r, c in zip(("system", "user"), pair, strict=True)] for pair in said)
        (tmp_path / name).write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        return str(tmp_path / name)

    got = calibration_tokens(dialogues("a.jsonl", "ours"), plain, 16, 1024)
    found = overlap(got.sketch, read.read_text(dialogues("b.jsonl", "theirs")).words(10**9))
    assert found.count > 0 and found.fraction < MOST_SHARED
    again = overlap(got.sketch, read.read_text(dialogues("c.jsonl", "ours")).words(10**9))
    assert again.fraction > MOST_SHARED


def test_chats_share_their_template_and_no_words(chat, tmp_path):
    """What is compared is what was said: every chat of a model begins with the same template."""
    ours = chats(tmp_path / "a.jsonl", [some_words(i) for i in range(100)])
    got = calibration_tokens(ours, chat, 4, 64)
    assert "helpful assistant" in chat.decode(got.tokens.flatten())
    other = read.read_text(chats(tmp_path / "b.jsonl", [some_words(1000 + i) for i in range(100)]), chat)
    assert "helpful assistant" in other.content and overlap(got.sketch, other.words(10**9)).count == 0
    every = calibration_tokens(ours, chat, 240, 256)
    leaking = [some_words(i if i % 20 == 0 else 1000 + i) for i in range(100)]  # one in twenty is ours
    copied = read.read_text(chats(tmp_path / "c.jsonl", leaking), chat)
    assert 0.03 < overlap(every.sketch, copied.words(10**9)).fraction < 0.07
    assert copied.words(1) == leaking[0]


def test_bos_replaces_the_first_token_of_each_window(plain, with_bos, corpus):
    got = calibration_tokens(str(corpus), with_bos, 4, 32)
    reference = calibration_tokens(str(corpus), plain, 4, 32)
    assert got.bos and got.tokens[:, 0].tolist() == [0, 0, 0, 0]
    assert torch.equal(got.tokens[:, 1:], reference.tokens[:, 1:])


def test_the_sketch_knows_the_text_that_was_used_and_not_the_rest(plain, corpus):
    content = corpus.read_text(encoding="utf-8")
    got = calibration_tokens(str(corpus), plain, 4, 64)
    used = [plain.decode(row) for row in got.tokens]
    assert all(overlap(got.sketch, text).count > 0 for text in used)
    assert overlap(got.sketch, content).fraction < 0.1


def test_the_default_text_gives_what_it_has_and_says_so(plain):
    few = calibration_tokens(None, plain, 8, 32)
    assert few.tokens.shape == (8, 32) and few.name == calibration_text().name and few.note == ""
    many = calibration_tokens(None, plain, 10**6, 512)
    assert 1 < len(many.tokens) < 10**6 and str(len(many.tokens)) in many.note


def test_too_little_text_is_refused_with_the_count(plain, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("hello world, this is short")
    count = len(plain("hello world, this is short")["input_ids"])
    with pytest.raises(QkitError, match=f"has {count} tokens; 8 x 512 = 4096 are needed"):
        calibration_tokens(str(path), plain, 8, 512)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_senseless_sizes(plain, samples, length):
    with pytest.raises(QkitError, match="at least 1 sample"):
        calibration_tokens(None, plain, samples, length)


def test_jsonl_of_text_and_messages(plain, tmp_path):
    rows = [
        {"text": "first document"},
        {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]},
    ]
    body = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path = tmp_path / "data.jsonl"
    path.write_text(body)
    assert read.read_text(str(path), plain).content == "first document\n\nquestion\nanswer\n"
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(body.encode()))
    assert read.read_text(str(packed), plain).content == "first document\n\nquestion\nanswer\n"

    chat = tokenizer(bos=False)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
    assert read.read_text(str(path), chat).content == "first document\n\n[user] question;[assistant] answer;\n"
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QkitError, match=r"line 2.*roles must alternate"):
        read.read_text(str(path), chat)


def test_only_a_newline_ends_a_row(tmp_path):
    """JSON may hold the other line separators of Unicode as they are."""
    path = tmp_path / "data.jsonl"
    rows = ["one\u2028two\x85three\u2029four", "five"]
    path.write_bytes("\r\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows).encode())
    assert [d.text for d in read.read_text(str(path)).documents] == rows


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
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], "cannot be decompressed"),
        ("not.jsonl.gz", b"plain", "cannot be decompressed"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1: not JSON"),
        ("nested.jsonl", b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}", "line 1: not JSON"),
    ],
)
def test_bad_files(plain, tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(QkitError, match=message):
        read.read_text(str(path), plain)


def test_a_text_is_read_to_a_limit(monkeypatch, tmp_path):
    """Of a file, of what is packed in it, and of a device without end."""
    monkeypatch.setattr(read, "MAX_BYTES", 10_000)
    (tmp_path / "long.txt").write_bytes(b"x" * 10_001)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"x" * 10**7))
    assert (tmp_path / "bomb.txt.gz").stat().st_size < 10_000
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name in ("long.txt", "bomb.txt.gz", "device.txt"):
        with pytest.raises(QkitError, match="more than 10"):
            read.read_text(str(tmp_path / name))


def test_a_parquet_file_is_unpacked_to_a_limit(monkeypatch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": ["x" * 1000] * 1000})
    parquet.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert len(read.read_text(str(tmp_path / "t.parquet")).documents) == 1000
    monkeypatch.setattr(read, "MAX_BYTES", 100_000)
    with pytest.raises(QkitError, match="unpacks to more"):
        read.read_text(str(tmp_path / "t.parquet"))
    parquet.write_table(table, tmp_path / "t.parquet", store_schema=False)
    damaged = (tmp_path / "t.parquet").read_bytes().replace(b"text", b"te\xfft")
    (tmp_path / "t.parquet").write_bytes(damaged)
    with pytest.raises(QkitError, match="not a parquet file that can be read"):
        read.read_text(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages.x.y.z }}", "{{ messages[9].role }}", "{% for %}", "{{ 'a' * 10 ** 18 }}",
     "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
     "{{ range(10 ** 9) | list }}", "{% include '/etc/passwd' %}"],
)  # fmt: skip
def test_a_template_that_fails_is_refused(tmp_path, template):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    chat = tokenizer(bos=False)
    chat.chat_template = template
    with pytest.raises(QkitError, match="template refuses"):
        read.read_text(str(path), chat)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read.read_text(str(path)).content == "hello"


@pytest.mark.parametrize("spec", ["/no/such/file", "missing.txt", "./a/b", "a/b/c", "dir/file.jsonl"])
def test_a_missing_file_is_not_looked_up_on_the_hub(spec):
    with pytest.raises(QkitError, match="no such text file"):
        read.read_text(spec)


def test_a_folder(tmp_path):
    with pytest.raises(QkitError, match="is a folder"):
        read.read_text(str(tmp_path))


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
    got = read.read_text("org/data")
    assert got.content == "from the hub\n" and got.name == "org/data/data/train.jsonl"
    assert asked == [("org/data", "data/train.jsonl", "dataset")]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, spec, timeout: _Info("x.arrow"))
    with pytest.raises(QkitError, match="no file that can be read"):
        read.read_text("org/data")


def test_no_network(monkeypatch):
    import huggingface_hub

    def fail(self, spec, timeout):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(QkitError, match="Name or service not known") as caught:
        read.read_text("org/data")
    assert "--calib FILE" in (caught.value.hint or "")
