"""What strangers wrote costs a bounded amount to read and cannot steer a terminal; nothing here runs code of theirs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_imports import modules

from qkit.cli import main
from qkit.errors import QkitError
from qkit.untrusted import DEEPEST, MAX_YAML_BYTES, SlowPattern, compiled, matches, parse_json, parse_yaml, printable

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(JSON, st.booleans())
def test_json_is_what_json_loads_makes_of_it(value: object, ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "levels deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "levels deep"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ("9" * 5000, "digits"),
        ("[1,", "Expecting"),
        (b"\xff", "decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("", "Expecting"),
        ("[" + "[]," * 5_000_000 + "1]", "lists and objects"),
    ],
)
def test_json_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_as_deep_as_is_allowed_and_pairs_of_surrogates() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a {x: 1}\nb: {<<: *a}\n",
        "[" * 5000,
        "- " * 3000,
        "!!python/object/apply:os.system [id]",
        "!!timestamp x",
        "!!int x",
        "!!binary x",
        "2020-99-99",
        "a: b: c",
        "\x00",
        "x" * (MAX_YAML_BYTES + 1),
    ],
)
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_yaml_that_is_read() -> None:
    assert parse_yaml("- {a: 1, b: [x, 2.5]}\n- &unused text\n") == [{"a": 1, "b": ["x", 2.5]}, "text"]
    assert parse_yaml("") is None


def test_a_pattern_that_backtracks_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkit.untrusted.PATTERN_SECONDS", 0.1)
    with pytest.raises(SlowPattern):
        matches("((.|.)+)+[^a-z0-9_.]", "model.layers.0.self_attn.q_proj")
    assert matches(r"model\.layers\.\d+\.", "model.layers.12.mlp") and not matches(r"layers", "model.layers.1")
    for bad in ("(", "*", "a{99999999999}", "(?P<a>x)(?P<a>y)"):
        with pytest.raises(ValueError):
            compiled(bad)


def test_nothing_that_steers_a_terminal_is_printed() -> None:
    assert (
        printable("a\tb\n\x1b[31mred\x07 \x9b2J \u202eabc \ud800")
        == "a\tb\n\\x1b[31mred\\x07 \\x9b2J \\x202eabc \\xd800"
    )
    assert printable("größer, 模型 \N{GRINNING FACE}") == "größer, 模型 \N{GRINNING FACE}"


def test_names_in_files_reach_the_terminal_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b[2J\x1b]0;title\x07", "hidden_size": 8}))
    assert main(["profile", str(tmp_path), "--device", "h100-sxm", "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + captured.out


def test_messages_have_an_end() -> None:
    error = QkitError("x" * 10**6, "y" * 10**6)
    assert len(error.message) < 5000 and len(error.hint or "") < 5000 and "1000000 characters" in error.message


# Names of functions and modules that run what a file says, or may.
CODE = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
LOADERS = {("torch", "load"), ("torch", "hub"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
           ("numpy", "load"), ("np", "load"), ("joblib", "load"), ("os", "system"), ("os", "popen")}  # fmt: skip


def code_run(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that comes from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in named if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE:
            yield f"calls {node.func.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADERS:
                yield f"uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword):
            if node.arg == "trust_remote_code" and not _passed_on(node.value):
                yield "decides trust_remote_code itself"
            if node.arg in ("shell", "allow_pickle") and not (
                isinstance(node.value, ast.Constant) and not node.value.value
            ):
                yield f"gives {node.arg}"


def _passed_on(value: ast.expr) -> bool:
    """Whether it is the option that the user gave, or no."""
    if isinstance(value, ast.Constant):
        return value.value is False
    return (isinstance(value, ast.Name) and value.id == "trust_remote_code") or (
        isinstance(value, ast.Attribute) and value.attr == "trust_remote_code"
    )


def test_no_module_runs_what_a_file_says() -> None:
    found = {name: list(code_run(ast.parse(path.read_text()))) for name, path in modules().items()}
    assert len(found) > 200
    # Of an engine's own process: the adapter, a file of qkit's.
    assert {name: problems for name, problems in found.items() if problems} == {
        "qkit.measure.engines.adapters.sweep_worker": ["imports runpy"]
    }


# What reads JSON by itself, and whose it is.
OWN = {
    "qkit.untrusted": "the one that others use",
    "qkit.report.schema": "a file of qkit's", "qkit.estimate.rates": "a file of qkit's",
    "qkit.models.architecture.keys": "a file of qkit's", "qkit.kernels.triton.config": "a file of qkit's",
    "qkit.measure.footprint": "its own process", "qkit.measure.engines.sweep": "its own process",
    "qkit.measure.engines.adapters.sweep_worker": "its own process",
    "qkit.conversion.run": "what it has just written", "qkit.measure.endpoint.request": "what it has just written",
}  # fmt: skip


def test_json_and_yaml_of_strangers_have_one_reader() -> None:
    reads = re.compile(r"\bjson\.loads?\(|\bimport yaml\b|\byaml\.")
    assert {name for name, path in modules().items() if reads.search(path.read_text())} == OWN.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(p)", "eval(x)", "exec(x)",
        "yaml.load(t, Loader=L)", "f(trust_remote_code=True)", "f(trust_remote_code=x)", "run(c, shell=True)",
        "np.load(p, allow_pickle=True)", "from torch import hub\ntorch.hub.load(x)",
    ],
)  # fmt: skip
def test_the_check_sees_each_of_them(source: str) -> None:
    assert list(code_run(ast.parse(source)))


@pytest.mark.parametrize("name", ["trust_remote_code", "o.trust_remote_code", "False"])
def test_the_users_option_may_be_passed_on(name: str) -> None:
    assert not list(code_run(ast.parse(f"f(trust_remote_code={name})\nmodel.eval()\nre.compile(x)")))
