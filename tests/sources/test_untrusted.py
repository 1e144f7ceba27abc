"""Folders and files made to harm: each kind that the fuzzer found or that was looked for, once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qkit
from qkit.conversion.tasks import slab_ranges
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.sources.described import describe_source
from qkit.sources.folder import INDEX
from qkit.storage.safetensors import SafetensorsFile

SECRET = "a key that is nobody's business"


def make_folder(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64), **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(QkitError, match=message):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "README.md", "merges.txt", "LICENSE"])
def test_a_link_out_of_the_folder_takes_nothing_along(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "credentials").write_text(json.dumps({"model_type": "llama", "key": SECRET}))
    (folder / name).unlink(missing_ok=True)
    for target in (tmp_path / "credentials", Path("../credentials")):
        (folder / name).symlink_to(target)
        refused(folder, f"{name} is a link to .*outside of its folder")
        (folder / name).unlink()


def test_a_linked_folder_of_templates_takes_nothing_along(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text(SECRET)
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    refused(folder, "outside of its folder")


def test_links_that_are_somebodys_own_arrangement(folder: Path, tmp_path: Path) -> None:
    """Weights may lie on another disk, files beside each other, a folder behind a link, a snapshot in a cache."""
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "1").write_text("text")
    (folder / "merges.txt").symlink_to(blobs / "1")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        source = open_source(str(place))
        assert [s.name for s in source.sidecars] == ["merges.txt", "tokenizer.json", "vocab.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "/dev/tty", "folder"])
def test_what_is_no_file_is_not_read(folder: Path, name: str, what: str) -> None:
    (folder / name).unlink()
    if what == "pipe":
        os.mkfifo(folder / name)
    elif what == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(what)
    refused(folder, "")


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_a_config_alone_that_is_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path) if what == "pipe" else path.mkdir()
    with pytest.raises(QkitError):
        describe_source(str(tmp_path))


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "\0.safetensors", "x" * 300 + ".safetensors",
     "\\x.safetensors", "c:x.safetensors", ".x.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(folder, "not a safetensors file in its folder|lacks 1 of 1 shards")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"model_type": "\\ud800"}',
                                     '{"model_type": ' + "9" * 5000 + "}"])  # fmt: skip
def test_configs_that_nobody_could_walk_or_print(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "not valid JSON")


@pytest.mark.parametrize("named", [{"a": 1}, 5, "LlamaForCausalLM", [3], [None], [["x"]]])
def test_architectures_that_are_no_names(tmp_path: Path, named: object) -> None:
    refused(make_folder(tmp_path / "m", {"architectures": named}), "architectures in config.json")


@pytest.mark.parametrize("kind", [["llama"], 5, {"a": 1}, True])
def test_a_model_type_that_is_no_name(tmp_path: Path, kind: object) -> None:
    refused(make_folder(tmp_path / "a", {"model_type": kind}), "model_type in config.json")
    refused(make_folder(tmp_path / "b", {"text_config": {"model_type": kind}}), "model_type in config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(QkitError, match="model_type in config"):
        describe_source(str(tmp_path / "config.json"))


def test_a_name_too_long_for_a_path_is_no_base_model(tmp_path: Path) -> None:
    assert open_source(str(make_folder(tmp_path / "m", {"_name_or_path": "a/" + "b" * 5000}))).base_model


def test_a_layer_count_is_not_counted_up_to(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"num_hidden_layers": 10**12, "architectures": ["LlamaForCausalLM"]})
    for use in (lambda: qkit.convert(folder, tmp_path / "o", dry_run=True, method="rtn"), lambda: qkit.load(folder)):
        with pytest.raises(QkitError, match=r"tensors of block 1, 2, 3, 4, 5 \.\.\. are missing"):
            use()


def test_a_block_number_without_end_is_no_block(tmp_path: Path) -> None:
    """Python refuses to read a number of more than 4300 digits."""
    folder = make_folder(tmp_path / "m", **{f"model.layers.{'9' * 5000}.mlp.up_proj.weight": torch.ones(32, 64)})
    inspect(str(folder))
    qkit.convert(folder, tmp_path / "o", dry_run=True, method="rtn", group_size=32)


@pytest.mark.parametrize("named", ["logging", "pipeline", "AutoModel", "LlamaConfig", "absent", "__name__"])
def test_a_config_calls_nothing_of_transformers_but_models(named: str) -> None:
    from qkit.models.client_names import client_names

    config = {"model_type": "llama", "architectures": [named], "hidden_size": 64, "num_hidden_layers": 1}
    assert client_names(config, ["model.layers.0.mlp.gate"]) is None
    assert client_names({**config, "model_type": ["llama"]}, []) is None


CARDS = {
    "a license": ("license: mit\nlanguage: [en, de]\n", {"license": "mit", "language": ["en", "de"]}),
    "aliases": ("license: &a [x, x]\nlanguage: [*a, *a]\n", {}),
    "nested lists": ("license: [[x], [y]]\nlanguage: en\n", {"language": "en"}),
    "numbers": ("license: 5\nlanguage: [1, 2]\ndatasets: {a: b}\n", {}),
    "no YAML": ("license: [", {}),
    "a list": ("- license: mit\n", {}),
    "control characters": ("license: \x00\n", {}),
    "too deep": ("license: " + "[" * 5000 + "\n", {}),
    "code": ("license: !!python/object/apply:os.getcwd []\n", {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_gives_words_or_nothing(folder: Path, case: str) -> None:
    text, expected = CARDS[case]
    (folder / "README.md").write_text(f"---\n{text}---\n# A model\n")
    assert open_source(str(folder)).metadata == expected


def test_a_card_of_megabytes_is_not_parsed(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n" + "- x\n" * 10**6 + "---\n")
    assert open_source(str(folder)).metadata == {}
    (folder / "README.md").write_text("---\nlicense: mit\n---\n" + "text\n" * 10**6)
    assert open_source(str(folder)).metadata == {"license": "mit"}


def test_tensors_without_rows_in_pieces(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "none": torch.ones(0, 4), "flat": torch.ones(4, 0), "row": torch.ones(5)}
    save_file(tensors, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim():
            pieces = [file.rows(name, a, a + 1) for a in range(len(tensor))]
            assert torch.equal(torch.cat(pieces) if pieces else file.rows(name, 0, 0), tensor)


def test_a_tensor_of_no_bytes_has_no_rows_to_count(tmp_path: Path) -> None:
    """[2**40, 0] takes no room in a file."""
    entry = {"dtype": "F32", "shape": [1 << 40, 0, 4], "data_offsets": [0, 0]}
    header = json.dumps({"model.layers.0.mlp.experts.gate_up_proj": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    source = open_source(str(tmp_path))
    (name,) = source.names()
    assert len(slab_ranges(source.meta(name))) == 1 and source.read(name).numel() == 0
    inspect(str(tmp_path))


def test_a_number_of_experts_that_the_router_does_not_have(tmp_path: Path) -> None:
    import gguf_files
    import numpy as np

    keys = {"context_length": 64, "embedding_length": 32, "block_count": 1, "attention.head_count": 1,
            "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": 16_000, "expert_used_count": 1,
            "expert_feed_forward_length": 32}  # fmt: skip
    tensors = {"token_embd.weight": np.ones((260, 32), np.float32), "blk.0.attn_norm.weight": np.ones(32, np.float32),
               "blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)}  # fmt: skip
    with pytest.raises(QkitError, match="16000 experts in the metadata, a router of 2"):
        open_source(str(gguf_files.write(tmp_path / "m.gguf", "qwen3moe", keys, tensors)))
