"""Several models in one profile, and models that do not fit: the same figures, nothing held longer than needed, and
what fails loses nothing else."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file

import qkit
from qkit.cli import main
from qkit.errors import QkitError
from qkit.hardware import detect
from qkit.measure import bench, footprint, frontier, profile, quality, room, run, speed, summary
from qkit.report import write as report
from qkit.sources import open_source

LAYERS = 24


@pytest.fixture(scope="module", autouse=True)
def quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "GENERATED", 4)
        patch.setattr(speed, "REPEATS", 2)
        patch.setattr(speed, "_CEILING_BYTES", 1 << 20)
        patch.setattr(footprint, "apart", lambda *given: "not looked at")
        patch.setattr(quality, "SLICE_ELEMENTS", 4096)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of a deep small Llama and its conversions."""
    root = tmp_path_factory.mktemp("candidates")
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 128}
    base = make_model(root / "base", num_hidden_layers=LAYERS, **sizes)
    for name, scheme in (("w4", "w4a16"), ("w8", "w8a16")):
        qkit.convert(str(base), str(root / name), scheme=scheme, method="rtn", group_size=32)
    return {name: str(root / name) for name in ("base", "w4", "w8")}


def go(models, out, **options):
    return profile(models, device="cpu", out=str(out), **{"chunks": 2, "context": 16, **options})


def klds(result):
    return [row.quality["full"].against.kld for row in result.models]


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory):
    return go(folders["w4"], tmp_path_factory.mktemp("report"), baseline=folders["base"])


def test_each_model_has_the_figures_it_has_alone(folders, pair, tmp_path):
    result = go([folders["w4"], folders["w8"]], tmp_path, baseline=folders["base"])
    assert [row.name for row in result.models] == [folders["w4"], folders["w8"]] and result.passed
    assert result.models[0].quality == pair.models[0].quality
    w4, w8 = klds(result)
    assert w4.value > w8.value > 0
    assert [row.speed_how for row in result.models] == [bench.IN_TURNS] * 2
    # The baseline took turns with both, and its figures are of all its runs.
    times = result.baseline.speed[0]
    assert len(times.generate) == 2 * speed.REPEATS and len(times.tpot) == 2 * speed.REPEATS * (speed.GENERATED - 1)
    assert times.decode_tps == pytest.approx(len(times.tpot) / sum(times.tpot))
    assert len(result.models[0].speed[0].generate) == speed.REPEATS
    parsed = json.loads((tmp_path / "profile.json").read_text())
    assert [m["on_frontier"] for m in parsed["models"]] == [row.on_frontier for row in result.models]
    assert parsed["baseline"]["on_frontier"] is None and parsed["baseline"]["quality"] is None
    for body in (summary(result), (tmp_path / "profile.md").read_text(), (tmp_path / "profile.html").read_text()):
        assert "Lowest KL divergence" in body and "frontier" in body
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report.NAMES)


def test_several_without_a_baseline(folders, tmp_path):
    result = go([folders["w8"], folders["base"]], tmp_path)
    assert [row.on_frontier for row in result.models] == [None, None] and result.baseline is None
    assert [row.quality.how for row in result.models] == ["loaded", "loaded"]
    body = summary(result)
    assert (
        "Lowest perplexity" in body
        and "frontier" not in body
        and "measured one after the other" in (tmp_path / "profile.md").read_text()
    )


BUDGETS = {
    "both loaded": 4_000_000,
    "loaded one after the other": 2_000_000,
    "baseline streamed block by block": 1_300_000,
    "both streamed block by block": 550_000,
}


@pytest.mark.parametrize("how", list(BUDGETS))
def test_the_memory_decides_how_and_the_figures_stay(how, folders, pair, tmp_path, monkeypatch):
    here = detect.cpu()
    monkeypatch.setattr(run, "_allowed", lambda *given: replace(here, available_bytes=BUDGETS[how]))
    result = go(folders["w4"], tmp_path, baseline=folders["base"])
    (row,), base = result.models, result.baseline
    assert row.quality.how == how
    assert row.quality == replace(pair.models[0].quality, how=how)
    assert row.memory.weights == pair.models[0].memory.weights and row.kernels == pair.models[0].kernels
    assert base.memory.weights == pair.baseline.memory.weights
    assert (row.loaded, bool(row.speed)) == ((False, False) if how.startswith("both streamed") else (True, True))
    assert (base.loaded, bool(base.speed)) == ((False, False) if "streamed" in how else (True, True))
    said = bench.IN_TURNS if how == "both loaded" else bench.ALONE if row.loaded else bench.UNTIMED
    assert row.speed_how == said and result.passed
    for body in (summary(result), *((tmp_path / name).read_text() for name in report.NAMES)):
        assert how in body
    if not base.loaded:
        assert base.speed_how == bench.UNTIMED and base.memory.problem == "it does not fit, and ran block by block"
        assert bench.UNTIMED in (tmp_path / "profile.html").read_text()


def test_a_model_that_does_not_fit_is_scored_against_one_that_does(folders, pair, tmp_path, monkeypatch):
    here = replace(detect.cpu(), available_bytes=BUDGETS["baseline streamed block by block"])
    monkeypatch.setattr(run, "_allowed", lambda *given: here)
    result = go(folders["base"], tmp_path, baseline=folders["w4"], min_tps=1.0)
    assert result.models[0].quality.how == "model streamed block by block" and result.baseline.speed
    against = result.models[0].quality["full"].against
    assert against.perplexity == pair.models[0].quality["full"].perplexity and against.kld.value > 0
    assert result.failures == ("the speed was not measured, --min-tps is 1",) and not result.passed
    alone = go(folders["base"], tmp_path)
    assert alone.models[0].quality.how == "streamed block by block"
    assert alone.models[0].quality["full"].perplexity == result.models[0].quality["full"].perplexity
    assert "not timed" in summary(alone)


def test_what_cannot_even_be_streamed_is_refused_before_it_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("qkit.runtime.frame.Frame.fill", lambda *given: pytest.fail("read"))
    here = replace(detect.cpu(), available_bytes=100_000)
    monkeypatch.setattr(run, "_allowed", lambda *given: here)
    with pytest.raises(QkitError, match=r"even block by block, .* its largest decoder block .* cpu has 100\.0 kB"):
        go(folders["w4"], tmp_path, baseline=folders["base"])
    assert not list(tmp_path.iterdir())


def test_max_memory_is_of_the_process(monkeypatch):
    here = replace(detect.cpu(), available_bytes=8 << 30)
    monkeypatch.setattr("qkit.hardware.memory.resident", lambda: 1 << 30)
    assert run._allowed(here, None, 5) is here
    assert run._allowed(here, 3 << 30, 1 << 20).available_bytes == (2 << 30) - (1 << 20) - run._WORKING
    assert run._allowed(here, 64 << 30, 0).available_bytes == 8 << 30
    assert run._allowed(here, 1 << 20, 0).available_bytes == 0
    assert run._allowed(replace(here, id="cuda:0"), 3 << 30, 1 << 20).available_bytes == 3 << 30


def test_parts_are_what_the_pieces_take(folders, tmp_path):
    from qkit.runtime import load

    source = open_source(folders["base"])
    model = load(folders["base"], device="cpu")
    found = room.parts(source, 2)
    assert found.block == sum(p.nbytes for p in model.model.layers[0].parameters())
    assert found.embedding == model.model.embed_tokens.weight.nbytes
    assert found.head == model.lm_head.weight.nbytes + model.model.norm.weight.nbytes
    assert (found.reading, found.reading_around) == (0, 0)  # it is held as it is stored
    up = model.model.layers[0].mlp.up_proj.weight.numel()
    assert room.parts(open_source(folders["w4"]), 2).reading == 8 * up // 2
    wide = make_model(tmp_path / "wide", dtype=torch.float32)
    assert room.parts(open_source(str(wide)), 2).reading == 4 * 256 * 128


def test_a_tied_head_is_the_embedding_again(tmp_path):
    folder = make_model(tmp_path / "tied", tie_word_embeddings=True)
    found = room.parts(open_source(str(folder)), 2)
    assert found.head == found.embedding + 128 * 2


def test_no_more_than_the_baseline_and_one_model_are_held(folders, tmp_path, monkeypatch):
    from qkit.runtime import load

    alive, most = [], []

    def watched(*given, **named):
        model = load(*given, **named)
        alive.append(weakref.ref(model))
        most.append(sum(ref() is not None for ref in alive))
        return model

    monkeypatch.setattr("qkit.runtime.load", watched)
    go([folders["w4"], folders["w8"], folders["base"]], tmp_path, baseline=folders["base"])
    assert most == [1, 2, 2, 2]


def damaged(folder, out, change):
    """A copy whose tensors `change` altered in place."""
    shutil.copytree(folder, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return str(out)


def drop(tensors):
    del tensors["model.layers.5.mlp.up_proj.weight"]


def spoil(tensors):
    tensors["model.layers.5.mlp.up_proj.weight"][3, 4] = math.nan


def test_a_model_that_cannot_be_loaded_loses_nothing_else(folders, pair, tmp_path, capsys):
    bad = damaged(folders["base"], tmp_path / "bad", drop)
    argv = ["profile", folders["w4"], bad, folders["w8"], "--baseline", folders["base"], "--device", "cpu"]
    assert main([*argv, "--context", "16", "-o", str(tmp_path / "r"), "--json"]) == 1
    told = capsys.readouterr()
    parsed = json.loads(told.out)
    assert [m["name"] for m in parsed["models"]] == [folders["w4"], folders["w8"]] and parsed["passed"] is False
    (failed,) = parsed["failed"]
    assert failed["name"] == bad and "lacks model.layers.5.mlp.up_proj.weight" in failed["problem"]
    assert parsed["failures"] == [f"{bad}: {failed['problem']}"] and "was not measured" in told.err
    assert json.loads((tmp_path / "r" / "profile.json").read_text()) == parsed
    for name in report.NAMES[1:]:
        assert "lacks" in (tmp_path / "r" / name).read_text()


def test_one_model_that_cannot_be_loaded_is_an_error(folders, tmp_path):
    bad = damaged(folders["base"], tmp_path / "bad", drop)
    for models, baseline in ((bad, folders["base"]), (bad, None), (folders["w4"], bad)):
        with pytest.raises(QkitError, match="lacks"):
            go(models, tmp_path / "r", baseline=baseline)
    assert not list((tmp_path / "r").glob("*"))


def test_a_model_without_sense_keeps_its_speed(folders, tmp_path):
    bad = damaged(folders["base"], tmp_path / "bad", spoil)
    result = go(bad, tmp_path / "r", baseline=folders["base"], max_kld=1.0)
    (row,) = result.models
    assert row.quality is None and row.speed and row.on_frontier is None
    assert row.problems == ("quality: chunk 0: a model gave logits that are not finite",)
    assert result.failures == ("the KL divergence was not measured, --max-kld is 1", f"{bad}: {row.problems[0]}")
    for body in (summary(result), *((tmp_path / "r" / name).read_text() for name in report.NAMES)):
        assert "not finite" in body
    several = go([bad, folders["w4"]], tmp_path / "r", baseline=folders["base"])
    assert several.models[0].quality is None and klds(replace(several, models=several.models[1:]))[0].value > 0
    assert [row.on_frontier for row in several.models] == [None, True] and len(several.failures) == 1


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "out of memory"), (RuntimeError("x\ny"), "RuntimeError: x")]
)
def test_a_model_that_cannot_be_timed_keeps_its_quality(folders, pair, tmp_path, monkeypatch, error, said):
    measure = speed.measure
    calls = []

    def failing(models, *given, **named):
        calls.append(len(models))
        if len(calls) == 2:
            raise error
        return measure(models, *given, **named)

    monkeypatch.setattr(speed, "measure", failing)
    result = go([folders["w8"], folders["w4"]], tmp_path, baseline=folders["base"], min_tps=0.0)
    assert calls == [2, 2] and result.models[0].speed and result.models[1].speed == ()
    assert result.models[1].quality == pair.models[0].quality
    assert result.models[1].problems == (f"speed: {said}",)
    assert len(result.baseline.speed[0].generate) == speed.REPEATS
    assert [f.rpartition("/")[2] for f in result.failures] == [
        "w4: the speed was not measured, --min-tps is 0", f"w4: speed: {said}",
    ]  # fmt: skip


def test_thresholds_hold_for_each_model_and_name_it(folders, tmp_path):
    result = go([folders["w4"], folders["w8"]], tmp_path, baseline=folders["base"], max_kld=0.0, min_tps=0.0)
    assert len(result.failures) == 2 and result.failures[0].startswith(f"{folders['w4']}: mean KL divergence ")


def test_names_are_checked(folders, tmp_path):
    with pytest.raises(QkitError, match="is named twice"):
        go([folders["w4"], folders["w8"], folders["w4"]], tmp_path)
    with pytest.raises(QkitError, match="no model was named"):
        go([], tmp_path)


def retokenized(folder, out, swap):
    shutil.copytree(folder, out)
    file = out / "tokenizer.json"
    parsed = json.loads(file.read_text())
    swap(parsed)
    file.write_text(json.dumps(parsed))
    return str(out)


def test_another_tokenizer_is_refused_before_work(folders, tmp_path, monkeypatch):
    def exchange(parsed):
        vocab = parsed["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    monkeypatch.setattr("qkit.runtime.load", lambda *given, **named: pytest.fail("loaded"))
    other = retokenized(folders["base"], tmp_path / "other", exchange)
    for models, baseline in ((folders["w4"], other), ([folders["w4"], other], folders["base"])):
        with pytest.raises(QkitError, match=r"have different tokenizers: token \d+ is '[et]' in one and '[et]'"):
            go(models, tmp_path / "r", baseline=baseline)
    assert not (tmp_path / "r").exists()


def test_tokenizers_that_read_alike_are_the_same(folders, pair, tmp_path):
    """Of another file; one that cuts text elsewhere, where the tokens are the same; none at all beside a baseline."""

    def pieces(parsed):  # a byte that no text has makes room for a token
        parsed["model"]["vocab"]["he"] = parsed["model"]["vocab"].pop("ÿ")

    def split(parsed):
        pieces(parsed)
        parsed["model"]["merges"] = [["h", "e"]]

    def rename(parsed):
        parsed["model"]["fuse_unk"] = True

    same = retokenized(folders["base"], tmp_path / "same", rename)
    assert go(folders["w4"], tmp_path / "r", baseline=same).models[0].quality == pair.models[0].quality
    without = tmp_path / "without"
    shutil.copytree(folders["base"], without)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
    assert go(folders["w4"], tmp_path / "r", baseline=str(without)).models[0].quality == pair.models[0].quality
    with pytest.raises(QkitError, match="no usable tokenizer"):
        go(str(without), tmp_path / "r", baseline=folders["base"])
    whole = retokenized(folders["w4"], tmp_path / "whole", pieces)
    cut = retokenized(folders["base"], tmp_path / "cut", split)
    assert go(whole, tmp_path / "r", baseline=cut).models[0].quality == pair.models[0].quality
    with pytest.raises(QkitError, match="is 'ÿ' in one and 'he' in the other"):
        go(folders["w4"], tmp_path / "r", baseline=cut)


def test_other_vocabularies_are_refused_before_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("qkit.runtime.load", lambda *given, **named: pytest.fail("loaded"))
    wider = make_model(tmp_path / "wider", vocab_size=300)
    with pytest.raises(QkitError, match=r"different vocabularies: .*w4 260 and .*wider 300 tokens"):
        go(folders["w4"], tmp_path / "r", baseline=str(wider))


def test_a_text_shorter_than_a_chunk_is_refused_before_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("qkit.runtime.load", lambda *given, **named: pytest.fail("loaded"))
    monkeypatch.setattr(footprint, "apart", lambda *given: pytest.fail("loaded"))
    text = tmp_path / "short.txt"
    text.write_text("few words")
    with pytest.raises(QkitError, match="has 9 tokens; a window is 128") as caught:
        go(folders["w4"], tmp_path / "r", baseline=folders["base"], text=str(text))
    assert caught.value.hint == "use a longer text"


@pytest.mark.parametrize(("points", "best"), [
    ([(1, 0.3, 10), (2, 0.2, 9), (3, 0.1, 8)], [True, True, True]),
    ([(1, 0.3, 10), (2, 0.3, 9)], [True, False]),  # larger, slower, no closer
    ([(1, 0.3, 10), (2, 0.3, 12)], [True, True]),  # larger, and faster
    ([(1, 0.3, 10), (2, 0.3, 10.2)], [True, False]),  # a rate that differs by chance
    ([(1, 0.3, 10), (1, 0.3, 10)], [True, True]),
    ([(1, 0.3, None), (2, 0.4, 50)], [True, False]),  # one was not timed: size and closeness decide
    ([(1, 0.0, 1)], [True]),
    ([], []),
])  # fmt: skip
def test_the_frontier(points, best):
    assert frontier.on_frontier([frontier.Point(*p) for p in points]) == best
