"""Nothing of the user's is lost: wherever OUT points, whatever appears beside it, whenever the run ends."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from models import make_model
from results import QUICK, contents
from safetensors.torch import load_file, save_file

from qkit.conversion import execute, workspace
from qkit.conversion.run import convert
from qkit.conversion.workspace import partial_dir, resolve_out
from qkit.errors import QkitError
from qkit.storage.manifest import MANIFEST, Manifest


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b", "../..", "~nobody-of-that-name/out"])
def test_a_place_that_no_rename_fills_is_refused(llama, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(QkitError) as caught:
        convert(str(llama), name, method="rtn", dry_run=True)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_a_link_is_never_replaced(llama, tmp_path, kind):
    target, out = tmp_path / "target", tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    out.symlink_to(target)
    for dry_run in (True, False):
        with pytest.raises(QkitError, match="link"):
            convert(str(llama), out, method="rtn", restart=True, dry_run=dry_run)
    assert out.is_symlink() and not partial_dir(out).exists()


def test_a_mount_point_is_refused(llama, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(QkitError, match="mount point"):
        convert(str(llama), tmp_path / "out", method="rtn", dry_run=True)


@pytest.mark.parametrize("where", ["equal", "above", "below", "partial", "through a link"])
@pytest.mark.parametrize("what", ["source", "lora", "calib"])
def test_an_input_is_never_inside_the_output_nor_around_it(tmp_path, where, what):
    given = tmp_path / "some" / "input"
    given.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "some")
    out = {
        "equal": given,
        "above": given.parent,
        "below": given / "quantized",
        "partial": tmp_path / "some" / "inp",
        "through a link": tmp_path / "link" / "input",
    }[where]
    if where == "partial":
        given.rename(partial_dir(out))
        given = partial_dir(out)
    with pytest.raises(QkitError, match="inside the other"):
        resolve_out(out, [str(given)] if what == "source" else ["demo", str(given)])
    assert resolve_out(tmp_path / "elsewhere", ["demo", "org/name", None, str(given)]) == tmp_path / "elsewhere"


def test_restart_over_the_source_keeps_it(llama, tmp_path):
    exported = tmp_path / "export"
    convert(str(llama), exported, format="safetensors", scheme="none")
    before = contents(exported)
    for out in (exported, tmp_path, exported / "x"):
        with pytest.raises(QkitError):
            convert(str(exported), out, method="rtn", restart=True)
    assert contents(exported) == before


def test_neighbours_with_unlucky_names_stay(llama, tmp_path):
    out = tmp_path / "out"
    old = tmp_path / "out.qkit-old"
    old.mkdir()
    (old / "thesis.tex").write_text("mine")
    convert(str(llama), out, method="rtn")
    convert(str(llama), out, method="rtn", scheme="w8a16", restart=True)
    assert (old / "thesis.tex").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.qkit-old"]


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_appears_at_the_output_meanwhile_stays_and_so_does_the_work(llama, tmp_path, monkeypatch, what):
    out = tmp_path / "out"
    complete = workspace.Workspace.publish
    work = []

    def appear(self):
        if what == "file":
            out.write_text("mine")
        elif what == "folder":
            out.mkdir()
            (out / "mine").write_text("mine")
        else:
            out.symlink_to(tmp_path / "nowhere")
        complete(self)

    monkeypatch.setattr(workspace.Workspace, "publish", appear)
    with pytest.raises(QkitError, match=r"appeared|rename") as caught:
        convert(str(llama), out, method="rtn")
    assert caught.value.hint
    if what == "link":
        assert out.is_symlink()
        out.unlink()
    elif what == "file":
        assert out.read_text() == "mine"
        out.unlink()
    else:
        assert (out / "mine").read_text() == "mine"
        shutil.rmtree(out)
    monkeypatch.setattr(workspace.Workspace, "publish", complete)
    monkeypatch.setattr(execute, "make_shard", lambda *a: work.append(a))
    assert convert(str(llama), out, method="rtn").resumed
    assert not work and Manifest.load(out).complete


def test_restart_replaces_only_what_it_saw(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(str(llama), out, method="rtn")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(QkitError, match=r"notes\.txt"):
        convert(str(llama), out, method="rtn", scheme="w8a16", restart=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    publish = workspace.Workspace.publish

    def late(self):
        (out / "late.txt").write_text("mine")
        publish(self)

    monkeypatch.setattr(workspace.Workspace, "publish", late)
    with pytest.raises(QkitError, match="appeared"):
        convert(str(llama), out, method="rtn", scheme="w8a16", restart=True)
    assert (out / "late.txt").read_text() == "mine"


def test_a_strangers_file_in_the_workspace_is_kept(llama, tmp_path):
    out = tmp_path / "out"
    partial_dir(out).mkdir()
    (partial_dir(out) / "data.csv").write_text("mine")
    for restart in (False, True):
        with pytest.raises(QkitError, match=r"data\.csv"):
            convert(str(llama), out, method="rtn", restart=restart)
    assert (partial_dir(out) / "data.csv").read_text() == "mine"


@pytest.mark.parametrize("verify", [True, False])
def test_a_failed_verification_is_repaired_by_the_same_command(llama, tmp_path, monkeypatch, verify):
    out = tmp_path / "out"
    from qkit.conversion import finish

    wrote = finish.write_companions

    def damage(plan, source, work):
        wrote(plan, source, work)
        path = work.folder / plan.shards[-1].file
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(finish, "write_companions", damage)
    with pytest.raises(QkitError, match="verification failed") as caught:
        convert(str(llama), out, method="rtn")
    assert "same command" in (caught.value.hint or "") and not out.exists()
    assert not Manifest.load(partial_dir(out)).complete
    monkeypatch.setattr(finish, "write_companions", wrote)
    convert(str(llama), out, method="rtn", verify=verify)
    assert Manifest.load(out).verify(out) == []


def test_damage_between_two_runs_is_seen_without_verification(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    from qkit.conversion import finish

    def stop(*args):
        raise KeyboardInterrupt

    wrote = finish.write_companions
    monkeypatch.setattr(finish, "write_companions", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(str(llama), out, method="rtn")
    path = next(partial_dir(out).glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(finish, "write_companions", wrote)
    convert(str(llama), out, method="rtn", verify=False)
    assert Manifest.load(out).verify(out) == []


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "deep", num_hidden_layers=4)


def test_an_interruption_anywhere_gives_the_same_bytes_and_repeats_no_finished_block(deep, tmp_path, monkeypatch):
    """Every step that changes the disk is a place to stop: a rename of a file, of the folder, a fsync."""
    from qkit.calibrate import block

    options = {"method": "gptq", **QUICK}
    convert(str(deep), tmp_path / "whole" / "out", **options)
    expected = contents(tmp_path / "whole" / "out")
    real = {name: getattr(os, name) for name in ("replace", "rename", "fsync")}
    solved: list[int] = []
    quantize = block.Block.quantize
    monkeypatch.setattr(block.Block, "quantize", lambda self, *args: solved.append(1) or quantize(self, *args))

    class Countdown:
        left = 0

        def __call__(self, name):
            def step(*args):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
                return real[name](*args)

            return step

    countdown = Countdown()
    for name in real:
        monkeypatch.setattr(os, name, countdown(name))
    moments = random.Random(5).sample(range(1, 80), 30)
    for moment in moments:
        out = tmp_path / f"cut{moment}" / "out"
        solved.clear()
        countdown.left = moment
        try:
            convert(str(deep), out, **options)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
            before = len(solved)
            done = (
                {s for s in Manifest.load(partial_dir(out)).files}
                if partial_dir(out).is_dir() and (partial_dir(out) / MANIFEST).is_file()
                else set()
            )
            blocks = sum(1 for name in done if name.startswith("model-")) - 1  # the first file is not a block's
            solved.clear()
        countdown.left = 0
        if interrupted and not out.exists():
            convert(str(deep), out, **options)
            assert len(solved) <= 4 - max(0, min(before, 4) - 1)
            assert len(solved) <= 4 - max(0, blocks)
        assert contents(out) == expected, moment
        shutil.rmtree(out.parent)


def test_a_block_is_written_once(deep, tmp_path):
    """The finished file of a block is the only copy: no parts, and twice the disk is never asked for."""
    result = convert(str(deep), tmp_path / "out", method="gptq", **QUICK)
    plan = result.plan
    blocks = [s for s in plan.shards if s.block is not None]
    assert [s.block for s in blocks] == [0, 1, 2, 3]
    for shard in blocks:
        assert all(f"layers.{shard.block}." in t.name for t in shard.tasks)
    assert plan.disk_needed < plan.bytes_out + (20 << 20)
    assert not (tmp_path / "out" / "parts").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in plan.shards:
        stored = load_file(tmp_path / "out" / shard.file)
        assert {n for n, f in index.items() if f == shard.file} == set(stored)


def test_a_zero_size_tensor_is_carried_along(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.extra.weight"] = torch.empty(64, 0, dtype=torch.bfloat16)
    weights["model.extra"] = torch.empty(0, dtype=torch.bfloat16)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    convert(str(source), tmp_path / "out", method="rtn")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    stored = load_file(tmp_path / "out" / index["model.layers.0.extra.weight"])
    assert stored["model.layers.0.extra.weight"].shape == (64, 0)
