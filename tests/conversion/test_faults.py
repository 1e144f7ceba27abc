"""What can go wrong while a conversion runs: an error that says so, or the same bytes; never half a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import make_model
from results import contents

from qkit.conversion import execute, finish, tasks, workspace
from qkit.conversion.run import convert
from qkit.conversion.workspace import LOCK, open_workspace, partial_dir
from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.storage.journal import JOURNAL
from qkit.storage.local import LocalStore
from qkit.storage.manifest import MANIFEST, Manifest
from qkit.storage.samples import spots

OPTIONS = {"method": "rtn"}
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def several_files(monkeypatch):
    monkeypatch.setattr(tasks.make_shards, "__defaults__", (150_000, False))


@pytest.fixture
def source(llama, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "source"))


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory):
    """What an undisturbed conversion writes: three files of weights among it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.make_shards, "__defaults__", (150_000, False))
        convert(str(llama), tmp_path_factory.mktemp("whole") / "out", **OPTIONS)
    found = contents(tmp_path_factory.getbasetemp() / "whole0" / "out")
    assert sum(name.startswith("model-") for name in found) == 3
    return found


@pytest.fixture
def midway(monkeypatch):
    """midway(action): as soon as the next conversion has noted its first file, `action()` happens, once."""
    commit = execute.commit

    def arrange(action):
        def step(*args):
            commit(*args)
            monkeypatch.setattr(execute, "commit", commit)
            action()

        monkeypatch.setattr(execute, "commit", step)

    return arrange


def stop():
    raise KeyboardInterrupt


def interrupted(source: Path, out: Path, midway, **options) -> Path:
    """The work folder of a run that was stopped after its first file."""
    midway(stop)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), out, **(options or OPTIONS))
    assert len(list(partial_dir(out).glob("model-*"))) == 1
    return partial_dir(out)


def fails(source: Path, out: Path, match: str, **options) -> QkitError:
    with pytest.raises(QkitError, match=match) as caught:
        convert(str(source), out, **(options or OPTIONS))
    assert caught.value.hint
    return caught.value


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_twenty_random_faults(tmp_path):
    """A tenth of what `benchmarks/faults.py` does by itself: things went wrong in real processes, and nothing is."""
    script = Path(__file__).parents[2] / "benchmarks" / "faults.py"
    command = [sys.executable, script, "--count", "20", "--seed", "5", "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["wrong"] == [], found["wrong"]
    assert found["faults"] >= 20 and len(found["by_kind"]) >= 5 and found["resumed_from_finished_files"] >= 1


# --- the source


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_source_that_changes_midway(source, tmp_path, expected, midway, how):
    out, path = tmp_path / "out", source / WEIGHTS
    before = path.read_bytes()

    def change():
        with open(path, "r+b") as file:
            if how == "truncated":
                file.truncate(len(before) // 2)
            else:
                file.seek(-1000, os.SEEK_END)
                file.write(b"\x11" * 1000)

    midway(change)
    fails(source, out, "changed while it was being read")
    assert not out.exists()
    # The same command with what is there now: refused, and the work stays for the source that it belongs to.
    fails(source, out, "not a valid safetensors file" if how == "truncated" else "another source")
    path.write_bytes(before)
    assert convert(str(source), out, **OPTIONS).resumed and contents(out) == expected


def test_a_source_with_the_same_size_and_time_under_its_name(source, llama, tmp_path, expected, midway):
    """What was opened is what is read: the file that took its name has no part in the result."""
    out, path = tmp_path / "out", source / WEIGHTS

    def swap():
        stat, other = path.stat(), source / "other"
        other.write_bytes(path.read_bytes()[:-5000] + b"\x11" * 5000)
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(other, path)

    midway(swap)
    convert(str(source), out, **OPTIONS)
    assert contents(out) == expected
    fails(source, out, "another conversion")


def test_a_tokenizer_that_changes_midway(source, tmp_path, expected, midway):
    out, path = tmp_path / "out", source / "tokenizer.json"
    before = path.read_text()
    midway(lambda: path.write_text(before + " "))
    fails(source, out, r"tokenizer\.json is not what it was")
    path.write_text(before)
    convert(str(source), out, **OPTIONS)
    assert contents(out) == expected


def test_a_source_that_is_gone_midway(source, tmp_path, expected, midway):
    out, aside = tmp_path / "out", tmp_path / "aside"
    midway(lambda: source.rename(aside))
    fails(source, out, "cannot read")
    assert not out.exists()
    aside.rename(source)
    assert convert(str(source), out, **OPTIONS).resumed and contents(out) == expected


def test_what_an_earlier_run_read_is_compared_where_no_sample_looks(source, tmp_path, midway):
    """Between two runs a tensor changes at a place that the fingerprint does not see: no mixture of two sources."""
    out, path = tmp_path / "out", source / WEIGHTS
    interrupted(source, out, midway)
    opened = open_source(str(source))
    before = opened.fingerprint
    done = Manifest.load(partial_dir(out)).sources
    name = next(n for n in opened.names() if n in done and opened.meta(n).nbytes > 16384)
    entry = opened._where[name].entries[name]
    (_, _), (second, length), *_ = spots(entry.offset, entry.meta.nbytes)
    with open(path, "r+b") as file:
        file.seek(second + length + 10)
        file.write(b"\x3c\x3c")
    assert open_source(str(source)).fingerprint == before
    assert name in str(fails(source, out, "is not what it was when it was converted"))
    assert not out.exists()
    convert(str(source), out, restart=True, **OPTIONS)
    convert(str(source), tmp_path / "clean", **OPTIONS)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("when", [978307200, 4102444800])
def test_times_do_not_matter(source, tmp_path, expected, midway, monkeypatch, when):
    """A clock that went backwards, or files from the future: content decides."""
    out = tmp_path / "out"
    work = interrupted(source, out, midway)
    for path in (*work.iterdir(), *source.iterdir(), work, source):
        os.utime(path, (when, when))
    written = []
    monkeypatch.setattr(execute, "commit", lambda s, w, to, c=execute.commit: (written.append(s.file), c(s, w, to)))
    assert convert(str(source), out, **OPTIONS).resumed
    assert len(written) == 2 and contents(out) == expected


# --- the folders


def test_the_work_folder_is_removed_midway(llama, tmp_path, expected, midway):
    out = tmp_path / "out"
    midway(lambda: shutil.rmtree(partial_dir(out)))
    fails(llama, out, "removed or replaced during the run")
    assert list(tmp_path.iterdir()) == []
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected


def test_the_folder_above_is_removed_midway(llama, tmp_path, expected, midway):
    out = tmp_path / "above" / "out"
    midway(lambda: shutil.rmtree(tmp_path / "above"))
    fails(llama, out, "removed or replaced during the run")
    assert list(tmp_path.iterdir()) == []
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected


def test_a_run_whose_folder_another_run_made_anew_writes_nothing_into_it(llama, tmp_path, midway):
    """Removed under the first run, made again by a second one of other options, which finishes."""
    out = tmp_path / "out"
    convert(str(llama), tmp_path / "other", scheme="w8a16", **OPTIONS)

    def take_over():
        shutil.rmtree(partial_dir(out))
        midway(stop)
        with pytest.raises(KeyboardInterrupt):
            convert(str(llama), out, scheme="w8a16", verify=False, **OPTIONS)

    midway(take_over)
    fails(llama, out, "removed or replaced during the run")
    assert convert(str(llama), out, scheme="w8a16", verify=False, **OPTIONS).resumed
    assert contents(out) == contents(tmp_path / "other")


@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "scheme": "w8a16"}, {**OPTIONS, "restart": True}])
def test_a_second_run_on_one_folder_is_refused_and_the_first_goes_on(llama, tmp_path, expected, midway, options):
    out = tmp_path / "out"
    midway(lambda: fails(llama, out, "another qkit convert is writing", **options))
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected and os.listdir(tmp_path) == ["out"]


def test_a_run_that_waited_for_the_end_of_another_one(llama, tmp_path, expected, monkeypatch):
    """It looked before the other one had finished, and gets the folder's name, or its lock, after that."""
    out, finished = tmp_path / "out", workspace.finished
    with monkeypatch.context() as patch:

        def late(*args):
            found = finished(*args)
            patch.setattr(workspace, "finished", finished)
            convert(str(llama), out, **OPTIONS)
            return found

        patch.setattr(workspace, "finished", late)
        fails(llama, out, "appeared at")
    assert contents(out) == expected and os.listdir(tmp_path) == ["out"]
    # The lock that it opened was the other one's, and has left with the folder.
    moved = tmp_path / "moved"
    locked = workspace._locked
    monkeypatch.setattr(workspace, "_locked", lambda handle: partial_dir(moved).rename(moved) and locked(handle))
    with pytest.raises(QkitError, match="another qkit convert"), open_workspace(moved, {}, []):
        pass


def test_the_lock_of_a_process_that_is_gone_does_not_count(llama, tmp_path, expected):
    out = tmp_path / "out"
    partial_dir(out).mkdir()
    hold = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'w'); f.write('{'); f.flush(); fcntl.flock(f, 2); "
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", hold, partial_dir(out) / LOCK]).returncode == -9
    convert(str(llama), out, **OPTIONS)
    assert contents(out) == expected


# --- an earlier result that is being replaced


@pytest.fixture
def replaced(llama, tmp_path, monkeypatch):
    """replaced(where): a run with --restart that dies while it puts its result in the place of an earlier one: between
    the two renames ("between"), or before the earlier one is gone ("removing"). What the earlier one held."""
    out = tmp_path / "out"
    convert(str(llama), out, scheme="w8a16", **OPTIONS)
    earlier = contents(out)

    def die(where):
        rename, count = os.rename, []

        def renames(a, b):
            count.append(a)
            if len(count) > 2:  # the probe, the earlier result aside; then the process is gone
                raise KeyboardInterrupt if len(count) == 3 else OSError("gone")
            rename(a, b)

        with monkeypatch.context() as patch:
            if where == "between":
                patch.setattr(os, "rename", renames)
            else:
                patch.setattr(workspace, "_remove_seen", lambda *args: stop())
            with pytest.raises(KeyboardInterrupt):
                convert(str(llama), out, restart=True, **OPTIONS)
        return earlier

    return die


def test_a_kill_between_the_renames_gives_the_earlier_result_back(llama, tmp_path, expected, replaced):
    out, earlier = tmp_path / "out", replaced("between")
    assert not out.exists() and list(tmp_path.glob("out.qkit-old-*"))
    fails(llama, out, "holds another conversion")
    assert contents(out) == earlier and not list(tmp_path.glob("out.qkit-old-*"))
    convert(str(llama), out, restart=True, **OPTIONS)
    assert contents(out) == expected and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stranger", [False, True])
def test_a_kill_before_the_earlier_result_is_gone(llama, tmp_path, expected, replaced, stranger):
    out = tmp_path / "out"
    replaced("removing")
    (aside,) = tmp_path.glob("out.qkit-old-*")
    (aside / "config.json").unlink()  # it had begun
    if stranger:
        (aside / "mine").write_text("mine")
        os.utime(aside / "README.md", (1, 1))  # and this one was edited
    assert convert(str(llama), out, **OPTIONS).already_done
    assert contents(out) == expected
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *([aside.name] if stranger else [])])
    if stranger:
        assert sorted(os.listdir(aside)) == ["README.md", "mine"]


def test_an_empty_lock_in_a_finished_folder_goes_and_a_strangers_folder_is_left_alone(llama, tmp_path, expected):
    out, other = tmp_path / "out", tmp_path / "other"
    convert(str(llama), out, **OPTIONS)
    (out / LOCK).touch()
    assert convert(str(llama), out, **OPTIONS).already_done and contents(out) == expected
    other.mkdir()
    (other / LOCK).write_text(json.dumps({"aside": "out", "seen": {}}))
    fails(llama, other, "was not written by qkit")
    assert os.listdir(other) == [LOCK] and contents(out) == expected


# --- the disk


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


# --- the manifest and its journal


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


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "deep", num_hidden_layers=4)


def test_a_worker_that_dies_keeps_what_was_finished(deep, tmp_path, monkeypatch):
    made, left = execute.Produce.__call__, [20]

    def dying(self, task):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return made(self, task)

    monkeypatch.setattr(execute.Produce, "__call__", dying)
    with pytest.raises(MemoryError):
        convert(str(deep), tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    wrote, names = finish.write_companions, []
    monkeypatch.setattr(finish, "write_companions", lambda p, s, w: (names.extend(w.inherited), wrote(p, s, w)))
    assert convert(str(deep), tmp_path / "out", **OPTIONS).resumed and names
    convert(str(deep), tmp_path / "clean", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
