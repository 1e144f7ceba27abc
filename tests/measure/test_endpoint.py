"""A running server under load: what is counted, what fails apart, and what a test ends with when the server dies."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace

import numpy as np
import pytest
from measure.sse_server import MODEL, Script, good

from qkit import cli
from qkit.errors import QkitError
from qkit.measure import measure_endpoint
from qkit.measure.endpoint import load, render, request, run
from qkit.measure.endpoint.address import parse
from qkit.measure.endpoint.prompts import Prompts
from qkit.measure.endpoint.request import Outcome
from qkit.report import schema

QUICK = {"context": 40, "max_tokens": 6, "concurrency": (1, 3), "timeout": 20.0}
WARM = 2  # requests that this server gets before the load: it counts its tokens as the first says


def reasons(level) -> dict[str, int]:
    return {f.reason: f.count for f in level.failed}


def test_every_request_counts_once(serve):
    server = serve(good)
    found = measure_endpoint(server.url, **QUICK)
    assert [level.concurrency for level in found.levels] == [1, 3] and found.problem is None and found.passed
    assert [level.requests for level in found.levels] == [8, 8]
    for level in found.levels:
        assert level.succeeded == 8 and level.failed == () and level.output_tokens == 8 * 6
        assert level.output_tps == pytest.approx(48 / level.seconds)
        assert level.requests_per_s == pytest.approx(8 / level.seconds)
    assert found.model == MODEL and found.route == "/completions" and found.counted == "usage" and found.ignore_eos
    assert found.warmups + 16 == len(server.served) and found.warmup_failures == ()


def test_prompts_have_the_wanted_length_and_no_common_beginning(serve):
    server = serve(good)
    found = measure_endpoint(server.url, **QUICK)
    prompts = [body["prompt"] for body in server.served[found.warmups :]]
    assert len({prompt[:16] for prompt in prompts}) == len(prompts)
    assert {len(prompt) // 5 for prompt in prompts} <= {39, 40, 41}  # the server's tokens are five characters
    assert all(body["max_tokens"] == body["min_tokens"] == 6 for body in server.served[found.warmups :])
    level = found.levels[0]
    assert level.prompt_tokens == sum(len(p) // 5 for p in prompts[:8])
    assert "as the server counted" in found.prompt_basis


def test_short_texts_are_repeated():
    made = Prompts("abc ", 100)
    assert all(len(made[i]) == 100 for i in range(9)) and made[0][17:] == ("abc " * 30)[: 100 - 17]


def test_no_more_requests_are_under_way_than_the_concurrency(serve):
    server = serve(lambda number, body: Script(between=0.01))
    measure_endpoint(server.url, **{**QUICK, "concurrency": (3,)})
    assert server.most == 3


def test_failures_are_counted_by_reason_and_in_no_figure(serve):
    bad = {
        0: Script(status=500, body={"error": {"message": "out of memory", "code": 500}}),
        1: Script(status=429, body={"message": "slow down"}),
        2: Script(cut=2),
        3: Script(raw=b"<html>\n<body>no</body>\n\n"),
        4: Script(raw=b"data: {not json}\n\n"),
        5: Script(error_after=2),
        6: Script(tokens=0),
        7: Script(usage=60),  # more than were asked for
        8: Script(usage=1),  # fewer than came
        9: Script(tokens=3),  # fewer than asked for
        10: Script(model="another"),
        11: Script(close=True),
        12: Script(json=True, body={"choices": [{"text": "all at once"}]}),
        13: Script(finish=None, done=False),
        14: Script(status=500, body=b"\xff plain"),
        15: Script(hang=30.0),
    }
    # The failing ones would be the fastest: they are answered at once, the good ones slowly.
    slow = Script(after=0.05, between=0.01)
    server = serve(lambda number, body: bad.get(number - WARM, slow))
    found = measure_endpoint(server.url, **{**QUICK, "concurrency": (2,), "requests": 24, "timeout": 4.0})
    (level,) = found.levels
    assert found.warmups == WARM
    assert reasons(level) == {
        "HTTP 500": 2, "HTTP 429": 1, "stream cut short": 2, "malformed stream": 2, "error in the stream": 1,
        "no tokens": 1, "usage is wrong": 2, "fewer tokens than asked": 1, "another model answered": 1,
        "connection closed without an answer": 1, "no stream": 1, "timeout": 1,
    }  # fmt: skip
    assert level.requests == 24 and level.succeeded == 24 - sum(reasons(level).values()) == 8
    assert level.output_tokens == 8 * 6 and level.ttft.p50 >= 0.05 and level.tpot.p50 >= 0.01
    example = {f.reason: f.example for f in level.failed}
    assert example["HTTP 429"] == "slow down" and example["error in the stream"] == "the engine is dead"
    assert example["HTTP 500"] in ("out of memory", "\ufffd plain")
    assert found.problem is None and found.passed  # some succeeded: the figures are theirs, the failures beside them
    text = render.summary(found)
    assert "slow down" in text and "usage is wrong" in text and render.markdown(found).count("HTTP 500") == 1


def test_a_server_that_dies_midway_leaves_what_was_measured(serve):
    server = serve(good)
    server.last = WARM + 8 + 5
    found = measure_endpoint(server.url, **{**QUICK, "concurrency": (1, 1, 2, 4)})
    whole, half, none = found.levels
    assert whole.succeeded == 8 and whole.failed == ()
    assert half.requests == 8 and half.succeeded == 5
    assert reasons(half) == {"connection refused": 2, "connection closed without an answer": 1}
    assert none.succeeded == 0 and reasons(none) == {"connection refused": 8}
    assert none.ttft is None and none.latency is None and none.output_tps == 0 and none.steady_tps is None
    assert found.unmeasured == (4,) and found.problem.startswith("at concurrency 2 all 8 requests failed")
    assert not found.passed and found.failures == (found.problem,)
    json.dumps(found.as_dict(), allow_nan=False)
    shown = render.summary(found)
    assert "not tried" in shown and "concurrency 4" in shown and shown.endswith(found.problem)


def test_a_level_that_has_no_time_for_all_of_its_requests_says_so(serve):
    server = serve(lambda number, body: Script(after=0.05))
    found = measure_endpoint(server.url, **{**QUICK, "concurrency": (2,), "level_seconds": 0.01})
    (level,) = found.levels
    assert level.requests == level.succeeded == 2 and found.passed
    assert "2 of 8 requests were sent in the time of a level" in render.summary(found)


def test_streams_cut_in_flight_when_the_server_dies(serve):
    """Every connection of a level ends in the middle of its stream; there is no level after it."""
    gate = threading.Barrier(3)

    def script(number, body) -> Script:
        if number < WARM + 9:
            return Script()
        gate.wait(20.0)
        return Script(cut=3)

    server = serve(script)
    found = measure_endpoint(server.url, **{**QUICK, "concurrency": (1, 3, 4), "requests": 9})
    assert found.levels[0].succeeded == 9
    assert found.levels[1].succeeded == 0 and set(reasons(found.levels[1])) == {"stream cut short"}
    assert found.unmeasured == (4,)


def test_percentiles_are_those_of_the_successes(serve):
    delays = [0.02, 0.06, 0.1, 0.14, 0.18, 0.22, 0.26, 0.3]

    def script(number, body) -> Script:
        index = number - WARM
        return Script(after=delays[index // 2]) if index >= 0 and index % 2 == 0 else Script(
            status=503 if index >= 0 else 200, body={}
        )  # fmt: skip

    found = measure_endpoint(serve(script).url, **{**QUICK, "concurrency": (1,), "requests": 16})
    (level,) = found.levels
    assert level.succeeded == 8 and reasons(level) == {"HTTP 503": 8}
    for name, p in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert np.percentile(delays, p) <= getattr(level.ttft, name)  # the failures, answered at once, are not in it
    assert level.ttft.mean >= np.mean(delays)


def outcome(at, tokens=None, reason=None, **named) -> Outcome:
    sent, *arrivals = at
    count = len(arrivals) if tokens is None else tokens
    end = max(at) + 0.5
    return Outcome(0.001, sent, end, tuple(arrivals), count, "usage", 10, reason=reason, **named)


def test_the_figures_of_a_level_by_hand():
    ran = load.Ran(
        (
            outcome([0.0, 1.0, 2.0, 4.0]),  # TTFT 1, TPOT 1.5, latency 4.5
            outcome([0.0, 2.0, 2.5, 3.0], tokens=6),  # two tokens a chunk: TPOT 0.2
            outcome([1.0, 9.0], reason="timeout", message="late"),
            outcome([5.0, 6.0], tokens=64),  # all in one chunk: no time between tokens
        ),
        0.0,
        10.0,
        2.5,
    )  # fmt: skip
    level = load.level(ran, 2, 6)
    assert (level.requests, level.succeeded, level.output_tokens) == (4, 3, 73)
    assert level.ttft.mean == pytest.approx(4 / 3) and level.ttft.p50 == 1.0
    assert level.tpot.mean == pytest.approx((1.5 + 0.2) / 2)
    assert level.gap.mean == pytest.approx(np.mean([1, 2, 0.5, 0.5]))
    assert level.latency.p50 == pytest.approx(3.5) and level.connect.p99 == pytest.approx(0.001)
    assert level.output_tps == pytest.approx(7.3) and level.requests_per_s == pytest.approx(0.3)
    # Until 2.5: two tokens of the first, two chunks of three of the second (four of its six tokens), none of the last.
    assert level.steady_tps == pytest.approx((2 + 4) / 2.5)
    assert level.prompt_tokens == 30 and level.problem == "4 of 6 requests were sent in the time of a level"
    assert load.spread([]) is None


def test_percentiles_against_numpy():
    values = list(np.random.default_rng(1).exponential(size=137))
    found = load.spread(values)
    assert [found.p50, found.p90, found.p99] == [np.percentile(values, p) for p in (50, 90, 99)]
    assert found.mean == pytest.approx(np.mean(values))


def test_a_level_is_capped_by_time_and_finishes_what_is_under_way():
    """No time at all: only what the level begins with is sent, and waited for."""
    together = threading.Barrier(4)

    def send(index: int) -> Outcome:
        together.wait(20.0)
        return outcome([0.0, 1.0])

    assert len(load.run(send, 4, 1000, 0.0).outcomes) == 4
    taken: list[int] = []
    ran = load.run(lambda index: taken.append(index) or outcome([0.0, 1.0]), 4, 100, 600.0)
    assert len(ran.outcomes) == 100 and sorted(taken) == list(range(100)) and ran.began <= ran.full_until


def test_a_server_that_never_answers_is_an_error_before_the_load(serve):
    server = serve(lambda number, body: Script(hang=30.0))
    with pytest.raises(QkitError, match=r"serves no request: timeout: no answer in 0\.3 s") as caught:
        measure_endpoint(server.url, **{**QUICK, "timeout": 0.3})
    assert "--timeout" in caught.value.hint


def test_a_stream_that_stalls_is_a_timeout_with_what_came(serve):
    server = serve(lambda number, body: Script(between=30.0) if number >= WARM else Script())
    found = measure_endpoint(server.url, **{**QUICK, "concurrency": (2,), "timeout": 0.5})
    assert reasons(found.levels[0]) == {"timeout": 8}
    assert found.levels[0].failed[0].example == "1 chunks came in 0.5 s"


def test_no_server_is_an_error_with_a_hint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(QkitError, match=r"does not answer: .*refused") as caught:
        measure_endpoint(f"http://127.0.0.1:{port}/v1")
    assert "is the server running" in caught.value.hint


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000/v1", "no http URL"),
        ("ftp://host/v1", "no http URL"),
        ("http:///v1", "no http URL"),
        ("http://host:99999/v1", "no URL"),
        ("http://host/v1?key=1", "a host, a port and a path"),
        ("http://user:secret@host/v1", "a host, a port and a path"),
    ],
)
def test_what_is_no_url(url, said):
    with pytest.raises(QkitError, match=said) as caught:
        measure_endpoint(url)
    assert "secret" not in str(caught.value) and "http://localhost:8000/v1" in caught.value.hint


def test_urls_are_taken_apart():
    assert parse("https://api.example.com/v1/").url == "https://api.example.com:443/v1"
    assert parse("http://[::1]:8000/v1").url == "http://[::1]:8000/v1"
    assert parse("http://host").port == 80


def test_the_model_is_the_one_that_is_listed(serve):
    server = serve(lambda number, body: Script(model=body["model"]), models={"data": [{"id": "a/one"}, {"id": "two"}]})
    assert measure_endpoint(server.url, **QUICK).model == "a/one"
    assert measure_endpoint(server.url, model="two", **QUICK).model == "two"
    with pytest.raises(QkitError, match="no model 'three'") as caught:
        measure_endpoint(server.url, model="three", **QUICK)
    assert caught.value.hint == "it has a/one, two"
    with pytest.raises(QkitError, match="lists no model"):
        measure_endpoint(serve(good, models=[]).url, **QUICK)
    with pytest.raises(QkitError, match=r"lists no model \(HTTP 404\)") as caught:
        measure_endpoint(server.url.removesuffix("/v1"), **QUICK)
    assert "/v1" in caught.value.hint


def test_the_key_comes_from_a_file_and_appears_nowhere(serve, tmp_path):
    server = serve(good, key="sk-secret")
    with pytest.raises(QkitError, match="refuses requests without a key") as caught:
        measure_endpoint(server.url, **QUICK)
    assert "--api-key-file" in caught.value.hint
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.write_text("sk-other\n")
    right.write_text("sk-secret\n")
    with pytest.raises(QkitError, match="refuses the key"):
        measure_endpoint(server.url, api_key_file=str(wrong), **QUICK)
    found = measure_endpoint(server.url, api_key_file=str(right), **QUICK)
    assert found.levels[0].succeeded == 8 and "sk-secret" not in json.dumps(found.as_dict())
    assert "sk-secret" not in repr(parse(server.url, "sk-secret"))


@pytest.mark.parametrize("content", ["", "two words", "ключ"])
def test_a_file_without_a_key(content, tmp_path):
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(QkitError, match="holds no key"):
        run.read_key(str(file))
    with pytest.raises(QkitError, match="cannot be read: No such file"):
        run.read_key(str(tmp_path / "none"))


def test_a_server_of_chats_alone(serve):
    server = serve(good, routes=("/v1/chat/completions",))
    found = measure_endpoint(server.url, **QUICK)
    assert found.route == "/chat/completions" and found.levels[0].output_tokens == 48
    assert server.served[-1]["messages"][0]["role"] == "user" and found.warmup_failures[0].reason == "HTTP 404"


def test_a_server_that_takes_no_more_than_it_knows(serve):
    """One that refuses what OpenAI's own does not have, and one that refuses stream_options too."""

    def strict(number, body) -> Script:
        return Script(status=400, body={"error": "unknown field"}) if "ignore_eos" in body else Script()

    found = measure_endpoint(serve(strict).url, **QUICK)
    assert not found.ignore_eos and found.counted == "usage" and found.levels[0].succeeded == 8

    def stricter(number, body) -> Script:
        return Script(status=422, body={"detail": [{"msg": "extra"}]}) if "stream_options" in body else Script()

    server = serve(stricter)
    found = measure_endpoint(server.url, **QUICK)
    assert found.counted == "chunks" and found.levels[0].output_tokens == 48 and "a guess" in found.prompt_basis
    assert set(server.served[-1]) == {"model", "max_tokens", "temperature", "stream", "prompt"}
    assert found.levels[0].prompt_tokens is None


def test_a_server_that_counts_only_whole_answers(serve):
    """Its streams carry no usage: an answer that is no stream says how long a prompt is."""

    def script(number, body) -> Script:
        said = {
            "choices": [{"text": "w"}],
            "usage": {"prompt_tokens": len(body["prompt"]) // 5, "completion_tokens": 1},
        }
        return Script(usage=False) if body["stream"] else Script(json=True, body=said)

    server = serve(script)
    found = measure_endpoint(server.url, **QUICK)
    assert found.counted == "chunks" and "5.00 characters a token, as the server counted" in found.prompt_basis
    assert {len(body["prompt"]) for body in server.served[found.warmups :]} == {200} and found.warmups == 3


def test_a_server_that_serves_nothing_is_an_error_with_its_words(serve):
    words = "this model's maximum context length is 32 tokens"
    server = serve(lambda n, body: Script(status=400, body={"error": {"message": words}}))
    with pytest.raises(QkitError, match=words) as caught:
        measure_endpoint(server.url, **QUICK)
    assert "--context" in caught.value.hint

    def long(number, body) -> Script:
        """The route of chats is there too and has its own reason: it is not what the user has to know."""
        return Script(status=400, body={"error": words if "prompt" in body else "no chat template"})

    with pytest.raises(QkitError, match=words):
        measure_endpoint(serve(long).url, **QUICK)
    broken = serve(lambda n, body: Script(status=500, body={"error": "dead"}))
    with pytest.raises(QkitError, match="HTTP 500: dead"):
        measure_endpoint(broken.url, **QUICK)
    assert len(broken.served) == 3  # tried again, as it may have been one bad moment


def test_one_bad_moment_while_warming_up_is_said_and_overcome(serve):
    found = measure_endpoint(serve(lambda n, b: Script(status=500, body={}) if n == 0 else Script()).url, **QUICK)
    assert [(f.reason, f.count) for f in found.warmup_failures] == [("HTTP 500", 1)]
    assert found.warmups == WARM + 1 and found.levels[0].succeeded == 8


def test_answers_that_the_model_ends_are_said(serve):
    found = measure_endpoint(serve(lambda n, b: Script(tokens=3, finish="stop")).url, **QUICK)
    assert found.levels[0].succeeded == found.levels[0].ended_early == 8
    assert "requests ended before" in render.summary(found)


def test_a_profile_of_an_endpoint(serve, tmp_path, capsys):
    server = serve(good)
    common = ["profile", "--endpoint", server.url, "--context", "40", "--max-tokens", "6", "--concurrency", "1", "2"]
    assert cli.main([*common, "-o", str(tmp_path / "r"), "--min-tps", "0.001"]) == 0
    out = capsys.readouterr().out
    assert MODEL in out and "output tok/s" in out
    saved = json.loads((tmp_path / "r" / "endpoint.json").read_text())
    assert saved["kind"] == "endpoint" and saved["passed"] and [row["succeeded"] for row in saved["levels"]] == [8, 8]
    assert "--endpoint" in saved["provenance"]["command"] and saved["thresholds"] == {"min_tps": 0.001}
    assert "| 1 | 8 | 0 |" in (tmp_path / "r" / "endpoint.md").read_text()
    assert schema.problems(saved) == []
    page = (tmp_path / "r" / "endpoint.html").read_text()
    assert "Output over concurrency" in page and "Thresholds met: min-tps 0.001" in page
    assert cli.main([*common, "-o", str(tmp_path / "s"), "--min-tps", "1e9", "--json"]) == 1
    assert "below 1e+09" in json.loads(capsys.readouterr().out)["failures"][0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--endpoint", "http://127.0.0.1:1/v1", "--baseline", "demo"], "--baseline is for models in files"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--engine", "vllm"], "--engine is for models in files"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "does not answer"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--concurrency", "0"], "--concurrency must be at least 1"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--timeout", "0"], "--timeout must be above 0"),
        ([], "no model was named"),
    ],
)
def test_what_a_profile_of_an_endpoint_refuses(given, said, tmp_path, capsys):
    assert cli.main(["profile", *given, "-o", str(tmp_path / "r")]) == 2
    assert said in capsys.readouterr().err


def test_a_failure_is_no_outcome_with_times():
    """What stands in a figure has no reason to have failed: of an outcome that failed after its tokens came, too."""
    ended = outcome([0.0, 1.0, 2.0])
    failed = replace(ended, reason="usage is wrong")
    level = load.level(load.Ran((ended, failed), 0.0, 4.0, 4.0), 1, 2)
    assert level.output_tokens == 2 and level.latency.mean == ended.latency and level.requests_per_s == 0.25
    assert request.TOKENS_A_CHUNK > 1
