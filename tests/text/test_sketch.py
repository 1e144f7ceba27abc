"""The sketch that tells whether two texts share a passage."""

from __future__ import annotations

import base64
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.text import sketch as text
from qkit.text.defaults import calibration_text

N, WINDOW = 13, 8


def words(rng: random.Random, count: int, prefix: str) -> str:
    return " ".join(f"{prefix}{rng.randrange(5000)}" for _ in range(count))


def test_a_text_overlaps_itself_completely():
    own = calibration_text().content[:20_000]
    found = text.overlap(text.sketch(own), own)
    assert found.fraction > 0.9 and found.count > 100


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    before=st.integers(0, 60),
    after=st.integers(0, 60),
    length=st.integers(N + WINDOW - 1, 60),
)
def test_a_planted_passage_is_always_found(seed, before, after, length):
    rng = random.Random(seed)
    passage = words(rng, length, "shared")
    ours = f"{words(rng, 300, 'a')} {passage} {words(rng, 300, 'b')}"
    theirs = f"{words(rng, before, 'c')} {passage} {words(rng, after, 'd')}"
    found = text.overlap(text.sketch(ours), theirs)
    assert found.count >= 1 and 0 < found.fraction <= 1
    assert found.example in passage and len(found.example.split()) >= N


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(0, N - 1))
def test_disjoint_texts_and_short_quotes_are_not_reported(seed, length):
    rng = random.Random(seed)
    quote = words(rng, length, "shared")
    ours = f"{words(rng, 200, 'a')} {quote} {words(rng, 200, 'b')}"
    theirs = f"{words(rng, 200, 'c')} {quote} {words(rng, 200, 'd')}"
    assert text.overlap(text.sketch(ours), theirs) == text.Overlap(0, 0.0, "")


def test_a_passage_that_a_text_repeats_counts_once():
    rng = random.Random(4)
    prompt = words(rng, 60, "shared")
    ours = f"{prompt} {words(rng, 500, 'a')}"
    found = text.overlap(text.sketch(ours), " ".join(f"{prompt} {words(rng, 80, f'row{i}x')}" for i in range(100)))
    assert 3 <= found.count <= 48 and 0.005 < found.fraction < 0.01
    assert text.overlap(text.sketch(ours), f"{ours} " * 50).fraction > 0.9  # copies of nothing else stay copies


def test_case_punctuation_and_line_breaks_do_not_hide_a_copy():
    rng = random.Random(1)
    passage = words(rng, 40, "w")
    disguised = passage.upper().replace(" ", ",\n  ")
    found = text.overlap(text.sketch(passage), disguised)
    assert found.fraction > 0.5 and found.example in disguised


def test_scripts_without_spaces_are_seen():
    passage = "量子化は重みを小さな整数で表し記憶と帯域を節約する方法である"
    assert text.overlap(text.sketch("あ" * 50 + passage), "い" * 50 + passage).count > 0


def test_winnowing_keeps_the_least_hash_of_every_window():
    own = words(random.Random(2), 200, "w")
    hashes = text._hashes(own.split(), N)
    kept = _decode(text.sketch(own))
    assert all(kept & set(hashes[i : i + WINDOW]) for i in range(len(hashes) - WINDOW + 1))
    assert len(kept) < len(hashes) / 2


def _decode(sketch: str) -> set[int]:
    data = base64.b64decode(sketch.split(":")[3])
    values = list(struct.unpack(f"<{len(data) // 8}Q", data))
    assert values == sorted(set(values))
    return set(values)


def test_sketch_is_stable_across_processes_and_versions():
    sketch = text.sketch("the quick brown fox jumps over the lazy dog while seven wizards quietly watch it")
    assert sketch == "winnow-blake2b64:13:8:NFABbOTriDc="


@pytest.mark.parametrize("short", ["", "a few words only"])
def test_texts_below_one_ngram(short):
    assert text.overlap(text.sketch(short), "anything " * 50).count == 0
    assert text.overlap(text.sketch("anything " * 50), short).count == 0


@pytest.mark.parametrize("bad", ["", "x", "winnow-blake2b64:13:8:@@", "other:13:8:", "winnow-blake2b64:13:8:AAAA", 7])
def test_a_sketch_that_is_none_is_refused(bad):
    with pytest.raises(QkitError, match="not a text sketch"):
        text.overlap(bad, "text")
