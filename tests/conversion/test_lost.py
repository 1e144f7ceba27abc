"""What a disk does to a conversion: full, read-only, or with a manifest or a journal that it lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from faulty import OPTIONS, fails, interrupted, stop
from results import contents

from qkit.conversion.run import convert
from qkit.conversion.workspace import partial_dir
from qkit.storage.journal import JOURNAL
from qkit.storage.local import LocalStore
from qkit.storage.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.usefixtures("several_files")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(MiB): a folder on a file system of that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(megabytes, *options):
        flags = ",".join([f"size={megabytes}m", *options])
        if subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_is_too_small_is_said_before_work(llama, small_disk):
    disk = small_disk(4)
    fails(llama, disk / "out", "are free there")
    assert os.listdir(disk) == []


def test_a_disk_that_fills_up_midway(llama, small_disk, expected, midway):
    disk = small_disk(24)
    out = disk / "out"
    midway(lambda: fill(disk / "filler"))
    assert "the disk is full" in str(fails(llama, out, "cannot write").hint)
    assert not out.exists()
    # Full even for a line of the manifest: the next run has nothing to say it with, and nothing to lose.
    fails(llama, out, "are free there|cannot write")
    (disk / "filler").unlink()
    assert convert(str(llama), out, **OPTIONS).resumed
    assert contents(out) == expected and os.listdir(disk) == ["out"]


def test_a_disk_that_becomes_read_only_midway(llama, small_disk, expected, midway):
    disk = small_disk(24)
    out = disk / "out"

    def read_only():
        work = partial_dir(out)
        subprocess.run(["mount", "--bind", work, work], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", work], check=True)

    midway(read_only)
    try:
        assert "mounted read-only" in str(fails(llama, out, "cannot write").hint)
        assert "mounted read-only" in str(fails(llama, out, "cannot open").hint)  # and at the next start
    finally:
        subprocess.run(["umount", partial_dir(out)], check=True)
    assert convert(str(llama), out, **OPTIONS).resumed and contents(out) == expected


def test_the_manifest_is_not_written_for_every_file(llama, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(LocalStore, "write", lambda self, n, c, w=LocalStore.write: (names.append(n), w(self, n, c))[1])
    convert(str(llama), tmp_path / "out", **OPTIONS)
    assert names.count(MANIFEST) == 2 and len([n for n in names if n.startswith("model-")]) == 3
    assert not (tmp_path / "out" / JOURNAL).exists()


@pytest.mark.parametrize("damage", ["torn", "garbage", "another shape", "gone"])
def test_a_journal_that_was_lost_in_part_costs_work_and_nothing_else(llama, tmp_path, expected, midway, damage):
    out = tmp_path / "out"
    path = interrupted(llama, out, midway) / JOURNAL
    assert len(path.read_bytes().splitlines()) == 1 and Manifest.load(partial_dir(out)).files
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[:-20])
    elif damage == "garbage":
        path.write_bytes(b"\0" * 100 + b"\n" + whole)
    elif damage == "another shape":
        path.write_bytes(b'{"files": {"model-00001-of-00003.safetensors": 7}, "tensors": {}, "sources": {}}\n' + whole)
    else:
        path.unlink()
    assert not Manifest.load(partial_dir(out)).files
    result = convert(str(llama), out, **OPTIONS)
    assert not result.resumed and contents(out) == expected


def test_a_journal_never_adds_to_the_manifest_of_another_conversion(llama, tmp_path, midway, monkeypatch):
    """Discarded with --restart, by a run that is gone as soon as it has written a manifest of its own."""
    out, others = tmp_path / "out", {**OPTIONS, "format": "gguf"}
    work = interrupted(llama, out, midway)
    noted = set(Manifest.load(work).sources)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda self, place, save=Manifest.save: (save(self, place), stop()))
        with pytest.raises(KeyboardInterrupt):
            convert(str(llama), out, restart=True, **others)
    assert noted and not Manifest.load(work).sources and not Manifest.load(work).files
    convert(str(llama), out, **others)
    convert(str(llama), tmp_path / "clean", **others)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("damage", [b"", b'{"schema": 1, "complete": tr', b"\0" * 4096, b"[]"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_lost_manifest_is_said_and_nothing_is_deleted(llama, tmp_path, expected, midway, damage, restart):
    out = tmp_path / "out"
    work = interrupted(llama, out, midway)
    (work / MANIFEST).write_bytes(damage)
    before = contents(work)
    error = fails(llama, out, MANIFEST, restart=restart, **OPTIONS)
    assert "move the folder away" in str(error.hint) and contents(work) == before
    work.rename(tmp_path / "away")  # as the hint says
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected


def test_a_finished_folder_with_a_damaged_manifest_is_left_alone(llama, tmp_path):
    out = tmp_path / "out"
    convert(str(llama), out, **OPTIONS)
    (out / MANIFEST).write_bytes(b"")
    before = contents(out)
    for restart in (False, True):
        fails(llama, out, MANIFEST, restart=restart, **OPTIONS)
    assert contents(out) == before


def test_files_that_two_kills_left_beside_are_gone_at_the_end(llama, tmp_path, expected):
    """A probe, a temporary in a folder below: whatever a kill leaves has a name that the next run knows."""
    out = tmp_path / "out"
    (tmp_path / ".out.qkit-probe-01234567").mkdir()
    (tmp_path / ".out.qkit-probe-mine").mkdir()
    (tmp_path / ".out.qkit-probe-mine" / "thesis").touch()
    (partial_dir(out) / "additional_chat_templates").mkdir(parents=True)
    (partial_dir(out) / "additional_chat_templates" / ".tool.jinja.0123abcd.qkit-tmp").touch()
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected
    assert sorted(os.listdir(tmp_path)) == [".out.qkit-probe-mine", "out"]
