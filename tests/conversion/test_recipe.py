"""A recipe decides each layer: its rules in order, what they refuse, and what a file may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qkit
from qkit import formats
from qkit.conversion.options import Options
from qkit.conversion.recipe import make_recipe, pick_group_size, settle
from qkit.conversion.run import convert
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.spec import CHANNEL, Keep, LayerSpec, integer
from qkit.spec.dtypes import TensorMeta
from qkit.spec.recipe import parse_rules
from qkit.storage.manifest import Manifest

METAS = {
    f"model.layers.{i}.{name}.weight": TensorMeta("BF16", (128, width))
    for i in range(2)
    for name, width in (("self_attn.q_proj", 128), ("mlp.up_proj", 128), ("mlp.down_proj", 192))
} | {"model.embed_tokens.weight": TensorMeta("BF16", (1000, 128))}
CT = formats.get("compressed-tensors")


def choices(tmp_path: Path, text: str | None, **options: object) -> dict[str, LayerSpec | Keep]:
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
        options["recipe"] = str(tmp_path / "recipe.yaml")
    return dict(settle(make_recipe(Options(**options)), METAS, CT, "BF16").choices)  # type: ignore[arg-type]


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    found = choices(
        tmp_path,
        """
        # comments are allowed
        - {modules: "*.layers.1.*.q_proj", scheme: keep}
        - {modules: ["*.down_proj", "*.q_proj"], scheme: w8a16, group_size: channel}
        """,
        skip=("model.layers.0.mlp.up_proj",),
    )
    assert found["model.layers.0.self_attn.q_proj.weight"] == integer(8, CHANNEL)
    assert found["model.layers.1.self_attn.q_proj.weight"] == Keep("kept by the recipe")
    assert found["model.layers.0.mlp.up_proj.weight"] == Keep("skipped on request")
    assert found["model.layers.1.mlp.up_proj.weight"] == integer(4, 128)
    assert found["model.layers.1.mlp.down_proj.weight"] == integer(8, CHANNEL)
    assert found["model.embed_tokens.weight"] == Keep("embedding")
    assert list(found) == list(METAS)


def test_a_group_size_is_chosen_for_the_layers_of_its_rule(tmp_path: Path) -> None:
    found = choices(tmp_path, "- {modules: '*.down_proj', scheme: w4a16-asym}")
    assert found["model.layers.0.mlp.down_proj.weight"] == integer(4, 64, symmetric=False)
    assert found["model.layers.0.mlp.up_proj.weight"] == integer(4, 128)
    assert choices(tmp_path, None)["model.layers.0.mlp.up_proj.weight"] == integer(4, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {modules: '*.dwon_proj', scheme: keep}", "matches no tensor"),
        ("- {modules: '*.embed_tokens', scheme: w8a16}", "embed_tokens.weight cannot be quantized: embedding"),
        ("- {modules: '*', scheme: w8a16}\n- {modules: '*.q_proj', scheme: w4a16}", "rule 2 .*earlier rules decide"),
        ("- {modules: '*', scheme: w5a16}", "rule 1: unknown scheme 'w5a16'"),
        ("- {modules: '*', scheme: w4a16, group_size: x}", "rule 1: group_size: 'x' is not a group size"),
        ("- {modules: '*', scheme: w4a16, group_size: 128}", "group size 128 does not divide .*192 wide"),
        ("- {modules: '*', sheme: w4a16}", "no modules or no scheme"),
        ("- {modules: '*', scheme: w4a16, bits: 3}", "unknown key 'bits'"),
        ("- {modules: [], scheme: w4a16}", "modules must be a pattern"),
        ("- {modules: '*', scheme: 4}", "scheme must be a name"),
        ("modules: '*'", "not a list of rules"),
        ("", "not a list of rules"),
        ("- {modules: '*'", "not valid YAML"),
        ("- !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_a_recipe_cannot_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(QkitError, match=message):
        choices(tmp_path, text)


def test_recipes_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(QkitError, match=r"cannot read .*absent\.yaml"):
        choices(tmp_path, None, recipe=str(tmp_path / "absent.yaml"))
    with pytest.raises(QkitError, match="not a regular file"):
        choices(tmp_path, None, recipe=str(tmp_path))
    (tmp_path / "latin").write_bytes(b"- \xff")
    with pytest.raises(QkitError, match="not UTF-8"):
        choices(tmp_path, None, recipe=str(tmp_path / "latin"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["w4a16", "keep", "*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["modules", "scheme", "group_size", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(JSON)
@settings(max_examples=300)
def test_any_content_is_rules_or_an_error_with_a_name(given_content: object) -> None:
    def size(value: object, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value not in (0, 32, 64, 128):
            raise QkitError(name)
        return value

    try:
        rules = parse_rules(given_content, "the file", size, None)
    except QkitError as error:
        assert "the file" in error.message
    else:
        assert rules and all(rule.modules for rule in rules)


def test_layers_that_engines_fuse_are_named() -> None:
    metas = {f"model.layers.0.self_attn.{n}_proj.weight": TensorMeta("BF16", (64, 64)) for n in "qkv"}
    mixed = settle(make_recipe(Options(skip=("*.k_proj",))), metas, CT, "BF16")
    assert any("q_proj, k_proj, v_proj are stored differently" in note for note in mixed.notes)
    assert not any("differently" in note for note in settle(make_recipe(Options()), metas, CT, "BF16").notes)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
def test_a_mixed_folder_converts_loads_and_says_so(llama: Path, tmp_path: Path, fmt: str, method: str) -> None:
    import torch

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {modules: '*.down_proj', scheme: w8a16}\n- {modules: 'model.layers.0.*', scheme: keep}\n")
    calib = {"calib_samples": 4, "calib_len": 32} if method == "gptq" else {}
    run = {"format": fmt, "method": method, "group_size": 32, "recipe": str(recipe), **calib}
    convert(str(llama), tmp_path / "mixed", **run)
    assert inspect(str(tmp_path / "mixed")).schemes == {"int8 symmetric g32": 2, "int4 symmetric g32": 6}
    assert convert(str(llama), tmp_path / "mixed", **run).already_done
    recipe.write_text("- {modules: '*.up_proj', scheme: w8a16}\n")
    with pytest.raises(QkitError, match="holds another conversion"):
        convert(str(llama), tmp_path / "mixed", **run)
    identity = Manifest.load(tmp_path / "mixed").identity
    assert str(tmp_path) not in str(identity) and identity["recipe"][0]["modules"] == "*.down_proj"
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        logits = qkit.load(str(tmp_path / "mixed"))(tokens).logits.float()
        plain = qkit.load(str(llama))(tokens).logits.float()
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.5


@pytest.mark.parametrize(("widths", "expected"), [((128, 256), 128), ((576, 1536), 64), ((96,), 32)])
def test_largest_group_that_divides_all(widths, expected):
    shapes = {f"l{i}": (8, w) for i, w in enumerate(widths)}
    assert pick_group_size(integer(), None, shapes).group_size == expected


def test_group_sizes_that_do_not_divide_are_refused():
    with pytest.raises(QkitError) as e:
        pick_group_size(integer(), 128, {"a": (8, 576), "b": (8, 1536)})
    assert "a, which is 576 wide" in e.value.message
    assert e.value.hint == "sizes that divide every quantized layer: 64, 32, channel"
    with pytest.raises(QkitError, match="100 wide"):
        pick_group_size(integer(), None, {"a": (8, 100)})
    with pytest.raises(QkitError, match="group size 7"):
        pick_group_size(integer(), 7, {"a": (8, 700)})
    assert pick_group_size(integer(), CHANNEL, {"a": (8, 100)}).group_size == CHANNEL
