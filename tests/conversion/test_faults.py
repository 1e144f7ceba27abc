"""What can go wrong while a conversion runs: an error that says so, or the same bytes; never half a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import OPTIONS, fails, interrupted, stop
from models import make_model
from results import contents

from qkit.conversion import execute, finish, workspace
from qkit.conversion.run import convert
from qkit.conversion.workspace import LOCK, open_workspace, partial_dir
from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.storage.manifest import Manifest
from qkit.storage.samples import spots

pytestmark = pytest.mark.usefixtures("several_files")
WEIGHTS = "model.safetensors"


@pytest.fixture
def source(llama, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "source"))


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
