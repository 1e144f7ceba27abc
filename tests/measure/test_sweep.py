"""An engine's sweep: points measured in a process of their own, and what is kept where that process ends."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from qkit.errors import QkitError
from qkit.measure import fit, profile, speed, summary
from qkit.measure.engines import command, render, table
from qkit.measure.engines import sweep as sweeping
from qkit.measure.engines.bandwidth import with_bandwidth
from qkit.measure.engines.plan import needed_cache, plan
from qkit.measure.engines.sweep import sweep
from qkit.measure.engines.types import Point, measured_point
from qkit.measure.options import Options
from qkit.options import from_kwargs
from qkit.sources import open_source

TOKENS = list(range(2, 250))


def points(*shapes, generated=4) -> tuple[Point, ...]:
    return tuple(Point(batch, context, context, generated) for batch, context in shapes)


def test_qkit_at_several_batches_and_contexts(llama):
    progress: list[float] = []
    wanted = points((1, 16), (2, 16), (1, 64))
    found = sweep(str(llama), "qkit", wanted, TOKENS, repeats=2, progress=progress.append)
    assert found.problem is None and found.engine_version.startswith("qkit ") and len(progress) == 3
    assert [(p.batch, p.context) for p in found.measured] == [(1, 16), (2, 16), (1, 64)]
    for point in found.points:
        assert (point.warmups, point.repeats) == (1, 2) and len(point.ttft) == len(point.generate) == 2
        assert len(point.tpot) == 2 * (point.generated - 1)
        assert point.ttft_p50 == np.percentile(point.ttft, 50)
        assert (point.tpot_p50, point.tpot_p90, point.tpot_p99) == tuple(np.percentile(point.tpot, (50, 90, 99)))
        assert point.prefill_tps == pytest.approx(point.batch * point.prompt / point.ttft_p50)
        assert point.decode_tps == pytest.approx(point.batch * len(point.tpot) / sum(point.tpot))
        assert point.generate_tps > 0
        if sys.platform == "linux":
            assert point.peak_bytes > 100 << 20  # torch alone is more
    assert found.settings["device"] == "cpu" and found.settings["dtype"] == "bfloat16"
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_does_not_run_is_skipped_with_its_reason(llama):
    sizes = fit.sizes(open_source(str(llama)))  # takes 512 tokens
    roomy = plan(sizes, [2, 1, 2], [512, 64, 1024], free=1 << 40, whole=True, generated=8)
    assert [(p.batch, p.context, p.prompt) for p in roomy if not p.skipped] == [
        (1, 64, 64), (2, 64, 64), (1, 512, 504), (2, 512, 504),
    ]  # fmt: skip
    assert [p.skipped for p in roomy if p.skipped] == ["the model takes 512 tokens"] * 2
    needed = sizes.weights + needed_cache(sizes, 1, 512) + max(sizes.head(1), sizes.layer(504, 1))
    tight = plan(sizes, [1, 2], [64, 512], free=needed, whole=True, generated=8)
    assert [(p.batch, p.context) for p in tight if p.skipped] == [(2, 512)]
    assert "by formula" in tight[-1].skipped and "are free" in tight[-1].skipped
    # An engine that reads a prompt in pieces needs no room for the activations of all of it.
    assert plan(sizes, [1], [512], free=needed - 1, whole=False)[0].skipped is None
    found = sweep(str(llama), "qkit", [p for p in roomy if p.context != 512], TOKENS, repeats=1)
    assert len(found.measured) == 2 and found.problem is None
    assert found.points[-1].skipped == "the model takes 512 tokens"
    nothing = sweep(str(llama), "qkit", roomy[-1:], TOKENS)
    assert nothing.measured == () and nothing.points == roomy[-1:] and nothing.problem is None


FAKE = """
    import os, signal, sys, time
    class Engine:
        version, max_context = "fake 1", 10_000
        def __init__(self, settings):
            print("a library's banner")
            self.settings = {"given": settings["model"]}
            {loading}
        def run(self, prompts, generated):
            batch, length = len(prompts), len(prompts[0])
            {running}
            return 0.001 * batch * length, [0.002] * (generated - 1)
        def generate(self, prompts, generated):
            return None
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An engine that does what a test says, while it loads and while it runs."""

    def make(loading="pass", running="pass"):
        source = textwrap.dedent(FAKE).replace("{loading}", loading).replace("{running}", running)
        (tmp_path / "run_fake.py").write_text(source)
        kind = table.Engine("fake", None, "", str(tmp_path / "run_fake.py"), str, whole=False)
        monkeypatch.setattr(table, "ENGINES", (*table.ENGINES, kind))
        return "fake"

    return make


FOUR = points((1, 10), (1, 20), (1, 40), (1, 80))


@pytest.mark.parametrize(
    ("running", "problem"),
    [
        ("if length == 40: os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL, as when memory"),
        ("if length == 40: os.abort()", "its process was ended by SIGABRT"),
        ("if length == 40: os._exit(3)", "its process failed with exit code 3"),
    ],
)
def test_what_was_measured_before_a_process_ends_is_kept(fake, running, problem):
    found = sweep("m", fake(running=running), FOUR, TOKENS, repeats=2)
    assert found.problem.startswith(problem)
    assert [p.context for p in found.measured] == [10, 20]
    assert found.measured[1].ttft == (0.02, 0.02) and found.measured[1].decode_tps == pytest.approx(500)
    assert [p.skipped for p in found.points[2:]] == [f"not reached: {found.problem}"] * 2
    assert found.engine_version == "fake 1" and found.settings == {"given": "m"}
    assert "not reached" in str(render.sections((found,))[-1])


def test_the_last_words_of_a_process_that_fails(fake):
    found = sweep("m", fake(running="print('no room', file=sys.stderr, flush=True); os._exit(1)"), FOUR, TOKENS)
    assert found.problem == "its process failed with exit code 1: no room" and found.measured == ()


def test_a_point_that_fails_is_skipped_and_the_others_go_on(fake):
    found = sweep("m", fake(running="assert length != 20, 'out of blocks\\nmore'"), FOUR, TOKENS, repeats=1)
    assert [p.context for p in found.measured] == [10, 40, 80] and found.problem is None
    assert found.points[1].skipped == "AssertionError: out of blocks"


def test_an_engine_that_does_not_load_says_why(fake):
    found = sweep("m", fake(loading="raise OSError('no such card')"), FOUR, TOKENS)
    assert found.problem == "OSError: no such card" and all(p.skipped for p in found.points)


def test_a_point_that_takes_far_too_long_is_ended(fake, monkeypatch):
    monkeypatch.setattr(sweeping, "_OVER", 1.0)
    found = sweep("m", fake(running="time.sleep(600 * (length == 40))"), FOUR, TOKENS, repeats=1, budget=3.0)
    assert found.problem == "its process was ended after 3 s without an answer"
    assert [p.context for p in found.measured] == [10, 20]


def test_a_process_that_leaves_children_behind_ends_all_the_same(fake):
    """A child holds the pipe open: the end of the process is what counts."""
    running = "length == 40 and (os.fork() == 0 and time.sleep(600), os._exit(5))"
    found = sweep("m", fake(running=running), FOUR, TOKENS, repeats=1)
    assert found.problem.startswith("its process failed with exit code 5") and len(found.measured) == 2


def test_points_and_runs_that_would_take_too_long_are_left_out(fake):
    """A prefill of 1 s a token, by its own account: what a larger point needs at the least is known beforehand."""
    engine = fake(running="return 1.0 * length, [1e-9] * (generated - 1)")
    found = sweep("m", engine, FOUR, TOKENS, repeats=9, budget=50.0)
    assert [p.context for p in found.measured] == [10, 20]
    assert [p.repeats for p in found.measured] == [4, 2]  # what is left of 50 s, at 10 s and at 20 s
    assert found.points[2].skipped == (
        "a warm-up and a run would prefill for 80 s or more, going by 10 tokens in 10.0 s; a point may take 50 s"
    )


def test_nothing_that_a_library_prints_is_an_answer(fake):
    found = sweep("m", fake(running='print(\'{"problem": "none"}\', flush=True)'), FOUR[:1], TOKENS, repeats=1)
    assert found.problem is None and len(found.measured) == 1


def test_the_sequences_of_a_batch_differ(fake):
    running = "assert len({tuple(p) for p in prompts}) == batch and len({p[0] for p in prompts}) == 1"
    found = sweep("m", fake(running=running), points((3, 50), (1, 300)), TOKENS, repeats=1)
    assert len(found.measured) == 2  # 300 tokens of a text of 248: it is repeated


def test_no_process_at_all(fake, monkeypatch):
    engine = fake()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = sweep("m", engine, FOUR, TOKENS)
    assert found.problem.startswith("no process could be started: No such file")


def test_engines_and_models_that_are_not_there(tmp_path, llama):
    with pytest.raises(QkitError, match="no engine 'vlm'") as caught:
        table.get("vlm")
    assert caught.value.hint == "the engines are qkit, vllm, llama.cpp"
    with pytest.raises(QkitError, match=r"llama\.cpp runs GGUF files") as caught:
        table.get("llama.cpp").place(str(llama))
    assert "--format gguf" in caught.value.hint
    with pytest.raises(QkitError, match="vLLM runs folders of safetensors"):
        table.get("vllm").place("demo")
    (tmp_path / "one.gguf").touch()
    assert table.get("llama.cpp").place(str(tmp_path)) == str(tmp_path / "one.gguf")
    assert table.get("vllm").place(str(llama)) == str(llama) and table.get("vllm").place("org/model") == "org/model"
    with pytest.raises(QkitError, match="vllm is not installed") as caught:
        table.python_with(table.get("vllm"), sys.executable)
    assert "--engine-python" in caught.value.hint
    with pytest.raises(QkitError, match="there is no Python /nowhere"):
        table.python_with(table.get("llama.cpp"), "/nowhere")
    with pytest.raises(QkitError, match="--engine-python needs an engine"):
        command.check(from_kwargs(Options, {"engine_python": "python"}), ["m"])
    with pytest.raises(QkitError, match="runs in this Python"):
        command.check(from_kwargs(Options, {"engine": "qkit", "engine_python": "python"}), ["m"])


def test_figures_of_a_point_by_hand():
    plan = Point(2, 100, 90, 5)
    steps = [0.1, 0.1, 0.2, 0.4]
    found = measured_point(
        plan, warmups=1, ttft=[1.0, 3.0], tpot=steps, generate=[(3.0, 0.8), (4.0, 1.2)], peak_bytes=None
    )
    assert found.ttft_p50 == 2.0 and found.prefill_tps == 90.0 and found.repeats == 2
    assert found.decode_tps == pytest.approx(2 * 4 / 0.8) and found.tpot_p50 == pytest.approx(0.15)
    assert found.generate == (3.0, 4.0) and found.generate_tps == pytest.approx(2 * 2 * 4 / 2.0)
    alone = measured_point(replace(plan, generated=1), warmups=1, ttft=[1.0], tpot=[], generate=[], peak_bytes=None)
    assert alone.tpot_p50 is alone.decode_tps is alone.generate_tps is None


@pytest.mark.parametrize("engine", ["qkit", "vllm"])
def test_bandwidth_of_a_point_by_hand(llama, engine):
    """Every weight but the embedding, and keys and values of each token; qkit and vLLM hold a 16-bit model alike."""
    source = open_source(str(llama))
    config = source.config
    cached = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2  # of a token
    weights = sum(source.meta(n).nbytes for n in source.names() if "embed_tokens" not in n)
    if config.get("tie_word_embeddings"):
        weights += source.meta("model.embed_tokens.weight").nbytes
    plan = Point(3, 100, 90, 8)
    done = measured_point(plan, warmups=1, ttft=[1.0], tpot=[1e-6, 2e-6, 3e-6], generate=[], peak_bytes=None)
    sweep = with_bandwidth(sweeping.Sweep(engine, "e 1", "m", {}, (done, plan)), source, "cpu", 40.0)
    first, second = sweep.points
    assert first.read_gbs == pytest.approx((weights + 3 * 94 * cached) / 2e-6 / 1e9)
    assert first.read_share == pytest.approx(first.read_gbs / 40) and second == plan
    row = dict(zip(render.table(sweep)[0], render.table(sweep)[1][0], strict=True))
    assert row["of ceiling"] == f"{first.read_share:.0%}" and row["read GB/s"] == f"{first.read_gbs:,.1f}"


def test_a_profile_with_an_engine(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GENERATED", 4)
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "_CEILING_BYTES", 1 << 20)
    out = tmp_path / "r"
    shown = summary(profile(str(llama), engine="qkit", sweep=[16, 32, 1024], context=64, chunks=1, out=str(out)))
    assert "the model takes 512 tokens" in shown
    saved = json.loads((tmp_path / "r" / "profile.json").read_text())
    (found,) = saved["sweeps"]
    assert [p["skipped"] is None for p in found["points"]] == [True, True, False]
    assert "sweep TPOT" in saved["formulas"] and "sweep read GB/s" in saved["formulas"]
    assert [p["read_gbs"] is not None for p in found["points"]] == [True, True, False]
    ceiling = saved["device"]["read_ceiling_gbs"]
    assert all(p["read_share"] == pytest.approx(p["read_gbs"] / ceiling) for p in found["points"][:2])
    assert "the model takes 512 tokens" in (tmp_path / "r" / "profile.md").read_text()
    assert "the model takes 512 tokens" in (tmp_path / "r" / "profile.html").read_text()
