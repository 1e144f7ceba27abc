"""The default texts: the same bytes on every machine, and no passage in both."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from qkit.text import defaults
from qkit.text.defaults import calibration_text, evaluation_text
from qkit.text.sketch import Overlap, overlap, sketch


def test_default_texts_are_pinned_and_disjoint():
    calibration, evaluation = calibration_text(), evaluation_text()
    assert calibration.sha256 == "c64e19db229390a924afb3395162165ea773b388d2483d45839c2406db868eb1"
    assert evaluation.sha256 == "cbc6625bf7df5fcf7072a0d5a0967b556ae32555b7cbb50f0d04f080acf4ba39"
    assert calibration.name == "cpython-3.11.7/language-reference"
    assert overlap(sketch(calibration.content), evaluation.content) == Overlap(0, 0.0, "")
    assert overlap(sketch(evaluation.content), calibration.content).count == 0
    for mark in ("::=", "\n*****", "\n====="):
        assert mark not in calibration.content


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the texts are of CPython 3.11.7")
def test_the_texts_are_what_the_script_makes():
    made = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "default_texts.py"))
    assert made["calibration_text"]() == calibration_text().content
    assert made["evaluation_text"](sketch(calibration_text().content)) == evaluation_text().content


def test_code_is_kept_and_prose_is_unwrapped():
    made = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "default_texts.py"))
    source = "Title\n*****\n\nA *wrapped*\nsentence with ``code``:\n\n   x = 1\n   y = 2\n\n   rule ::= a b\n"
    assert list(made["paragraphs"](source)) == ["Title", "A wrapped sentence with code:", "   x = 1\n   y = 2"]


def test_the_licence_comes_with_the_texts():
    folder = Path(defaults.__file__).parent / "data"
    assert "LICENSE-PSF" in (folder / "NOTICE").read_text()
    assert "PSF's notice of copyright" in (folder / "LICENSE-PSF").read_text()
